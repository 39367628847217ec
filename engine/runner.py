"""
All that touches the device: the encoder, packed prefill over many prompts, decode over many slabs.

Axes: T tokens of one call, num_seqs, vocab. The text model is called on one row of tokens, (1, T,
hidden); engine/attention.py knows whose they are.
"""

from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.attention import TextContext, can_use_flash, using
from engine.checkpoint import Checkpoint
from engine.families.qwen2_vl import Visual
from engine.kv import KVRows, KVShape
from engine.meter import Meter, Work
from engine.sequence import Sequence

MAX_ENCODER_PATCHES = 32_768  # of one encoder call; a larger picture gets a call alone
CPU_KV_BYTES = 1 << 29


class Runner:
    """
    Args:
        checkpoint: with the encoder attached to `model`.
        num_rows: KV rows to hold, scratch included.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any, num_rows: int) -> None:
        self.device, self.dtype = checkpoint.device, checkpoint.dtype
        self._family = checkpoint.family
        self._text = model.model.language_model
        self._embed = self._text.embed_tokens
        self._head = model.lm_head
        shape = KVShape.of(checkpoint.config.text_config, self.dtype)
        self._rows = KVRows(shape, num_rows, self.device)
        self.meter = Meter(self.device)
        self._uses_flash = can_use_flash(self.device, self.dtype, shape.dim)

    def encode(self, sequences: Many[Sequence]) -> None:
        """Give every sequence the features of its pictures; those that came as features stay."""
        # One of each request: its outputs share a list of features.
        waiting = {id(s.features): s for s in sequences if not s.features}.values()
        contents = [content for sequence in waiting for _, content in sequence.prepared.media]
        visuals = [content for content in contents if isinstance(content, Visual)]
        encoded: list[Tensor] = []
        for call in _calls([visual.grid.num_patches for visual in visuals]):
            picked = [visuals[i] for i in call]
            num_patches = sum(visual.grid.num_patches for visual in picked)
            with self.meter.span(Work.ENCODE, num_patches):
                encoded += self._family.encode(picked)
        features = iter(encoded)
        for sequence in waiting:  # NOTE: only now, so that a call that fails can be repeated
            sequence.features.extend(
                content.to(self.device, self.dtype)
                if isinstance(content, Tensor)
                else next(features)
                for _, content in sequence.prepared.media
            )

    @torch.inference_mode()
    def prefill(self, sequences: Many[Sequence]) -> Tensor:
        """
        Run whole prompts, packed, and write their rows.

        Returns:
            Logits after each prompt's last token: (num_seqs, vocab).
        """
        self.encode(sequences)
        num_tokens = sum(sequence.num_prompt_tokens for sequence in sequences)
        with self.meter.span(Work.PREFILL, num_tokens):
            return self._prefill(sequences)

    def _prefill(self, sequences: Many[Sequence]) -> Tensor:
        lens = [sequence.num_prompt_tokens for sequence in sequences]
        ids = np.concatenate([sequence.prepared.token_ids for sequence in sequences])
        x = self._embed(torch.from_numpy(ids).to(self.device))
        first_rows = np.cumsum([0, *lens])
        spans = [
            (int(first) + start, feature)
            for first, sequence in zip(first_rows, sequences, strict=False)
            for (start, _), feature in zip(sequence.prepared.media, sequence.features, strict=True)
        ]
        for start, feature in spans:
            x[start : start + len(feature)] = feature
        positions = np.concatenate([s.prepared.positions for s in sequences], axis=1)
        write_rows = np.concatenate(
            [_start(s) + np.arange(length) for s, length in zip(sequences, lens, strict=True)]
        )
        hidden = self._run(x, positions, write_rows, sequences, lens, lens)
        for sequence in sequences:
            sequence.features = []  # another: outputs that have no rows yet still need the old one
        last = torch.from_numpy(first_rows[1:] - 1).to(self.device)
        return self._head(hidden[last])  # type: ignore[no-any-return]

    @torch.inference_mode()
    def decode(self, sequences: Many[Sequence]) -> Tensor:
        """
        Run the newest token of each sequence, and write its row.

        Returns:
            Logits for the next token: (num_seqs, vocab).
        """
        with self.meter.span(Work.DECODE, len(sequences)):
            return self._decode(sequences)

    def _decode(self, sequences: Many[Sequence]) -> Tensor:
        lens = [sequence.num_rows for sequence in sequences]
        ids = torch.tensor([sequence.output_ids[-1] for sequence in sequences], device=self.device)
        rows = np.array([_start(s) + n - 1 for s, n in zip(sequences, lens, strict=True)])
        at = np.array([n - 1 + s.prepared.rope_delta for s, n in zip(sequences, lens, strict=True)])
        ones = [1] * len(sequences)
        hidden = self._run(self._embed(ids), np.tile(at, (3, 1)), rows, sequences, lens, ones)
        return self._head(hidden)  # type: ignore[no-any-return]

    def _run(
        self,
        x: Tensor,
        positions: np.ndarray,
        write_rows: np.ndarray,
        sequences: Many[Sequence],
        lens: Many[int],
        num_queries: Many[int],
    ) -> Tensor:
        """x: (T, hidden), positions: (3, T), write_rows: (T,) -> (T, hidden)."""
        starts = [_start(sequence) for sequence in sequences]
        context = TextContext(
            self._rows.keys,
            self._rows.values,
            torch.from_numpy(write_rows).to(self.device),
            starts,
            lens,
            num_queries,
            self._device_spans(starts, lens, num_queries) if self._uses_flash else None,
        )
        with using(context):
            output = self._text(
                inputs_embeds=x[None],
                position_ids=torch.from_numpy(positions)[:, None].to(self.device),
                use_cache=False,
            )
        return output.last_hidden_state[0]  # type: ignore[no-any-return]

    def _device_spans(
        self, starts: Many[int], lens: Many[int], num_queries: Many[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        query_starts = np.cumsum([0, *num_queries])
        table = [query_starts, [*starts, 0], [*lens, 0]]
        packed = torch.tensor(np.array(table), dtype=torch.int32).to(self.device)
        return packed[0], packed[1], packed[2, :-1]


def num_kv_rows(
    checkpoint: Checkpoint, *, least: int, most: int, kv_bytes: int | None, utilization: float
) -> int:
    """
    How many KV rows to allocate: as many as can be used at once, within what memory allows.

    Args:
        least: rows that one sequence of the greatest length uses. On a CPU without a budget there
            are always as many: its memory is not all ours to divide.
        most: rows that the most and longest sequences could use.
        kv_bytes: an explicit budget; None for a share of the device.
        utilization: that share, of the whole device, what is in use already included.
    """
    shape = KVShape.of(checkpoint.config.text_config, checkpoint.dtype)
    if kv_bytes is None:
        kv_bytes = max(CPU_KV_BYTES, least * shape.row_bytes)
        if checkpoint.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(checkpoint.device)
            # A tenth of the device stays free for the activations of encoder and prefill.
            kv_bytes = int(free - total * (1 - utilization) - total * 0.1)
    return max(0, min(most, kv_bytes // shape.row_bytes))


def _start(sequence: Sequence) -> int:
    assert sequence.start is not None, "a sequence runs only with a slab"
    return sequence.start


def _calls(num_patches: Many[int]) -> list[list[int]]:
    """Cut a list of pictures into encoder calls of at most MAX_ENCODER_PATCHES."""
    calls: list[list[int]] = []
    total = 0
    for index, count in enumerate(num_patches):
        if not calls or total + count > MAX_ENCODER_PATCHES:
            calls.append([])
            total = 0
        calls[-1].append(index)
        total += count
    return calls
