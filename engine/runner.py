"""
All that touches the device: the encoder, packed prefill over many prompts, decode over many slabs.

Axes: T tokens of one call, num_seqs, vocab. The text model is called on one row of tokens, (1, T,
hidden); engine/attention.py knows whose they are. Nothing here waits for the device.
"""

import logging
import math
from collections.abc import Sequence as Many
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.attention import Ends, TextContext, can_use_flash, using
from engine.checkpoint import Checkpoint
from engine.errors import BadConfig
from engine.families.protocol import Visual
from engine.features import FeatureCache
from engine.graphs import Graphs, Replayed
from engine.kernels import draw
from engine.kernels.greedy import argmax
from engine.kernels.quantised import FP8
from engine.kernels.rows import copy_
from engine.kv import KVRows
from engine.meter import Meter, Work
from engine.recorder import Recorder
from engine.repeats import Repeats
from engine.rounding import power_up, round_up
from engine.sequence import Sequence
from engine.slots import LEN, NUM_COLUMNS, POSITION, SLOT, START, WRITE_ROW, Slots, Table
from engine.swaps import find_decode_attention, find_prefill_attention
from engine.uploads import upload

logger = logging.getLogger(__name__)

MAX_ENCODER_PATCHES = 32_768  # of one encoder call; a larger picture gets a call alone
# On a CPU weights come from the cache for small calls too, and tensors of over 32 MiB are new pages
# each time: a sixth of the encoder's time in calls of 16 pictures (tiny-50m, EPYC, 2026-11-28).
CPU_ENCODER_PATCHES = 2048
# Places of every decode call of a deterministic engine on a CPU. Of 16 rows each costs about what it
# does of 256. A GPU, which reads all weights in each call, gets as many as may decode together.
CPU_FIXED_PLACES = 16
CPU_KV_BYTES = 1 << 29
# Rows of a step's table that grow by one each step; the last where tokens are drawn.
_COUNTING = [WRITE_ROW, POSITION, LEN, NUM_COLUMNS + draw.AT]


class Runner:
    """
    Args:
        checkpoint: its family attached to the loaded model.
        num_rows: KV rows to hold, scratch included.
        max_num_seqs: sequences that decode together at most.
        max_prefill_tokens: of one prefill; no prefill is filled up beyond that.
        cache_bytes: of encoded pictures that are kept for prompts to come.
        uses_graphs: whether decode steps become CUDA graphs, on a GPU.
        is_deterministic: whether calls have shapes that do not depend on who else is there: a picture
            each, and always as many places to decode in. Prompts must come one by one.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        num_rows: int,
        *,
        max_num_seqs: int,
        max_prefill_tokens: int,
        cache_bytes: int = 0,
        uses_graphs: bool = True,
        is_deterministic: bool = False,
    ) -> None:
        self.device, self.dtype = checkpoint.device, checkpoint.dtype
        self._family = checkpoint.family
        self._text, self._embed = self._family.text, self._family.embed
        self._head = self._family.head
        self._num_axes = self._family.num_axes
        self._max_prefill_tokens = max_prefill_tokens
        shape = checkpoint.kv_shape
        self._rows = KVRows(shape, num_rows, self.device)
        self.meter = Meter(self.device)
        self.cache = FeatureCache(cache_bytes)
        is_cpu = self.device.type == "cpu"
        self._max_patches = CPU_ENCODER_PATCHES if is_cpu else MAX_ENCODER_PATCHES
        self._num_places: int | None = None  # of every decode call; None for as many as there are
        self._max_rows = checkpoint.max_model_len
        if is_deterministic:
            self._max_patches = 1
            self._num_places = CPU_FIXED_PLACES if is_cpu else max_num_seqs
        self._slots = Slots(max_num_seqs, self.device)
        self._last_table: tuple[list[Sequence], Table, int] = [], np.zeros((0, 0), np.int64), 0
        self._uses_flash = all(
            can_use_flash(self.device, self.dtype, layer.dim) for layer in shape.layers
        )
        if self._uses_flash and self._family.sees_both_ways:
            logger.warning("prefill_is_slow of prompts with pictures, whose tokens see each other")
        self._decode_kernel = find_decode_attention(
            self.device, self.dtype, max(layer.dim for layer in shape.layers)
        )
        self._prefill_kernel = find_prefill_attention(
            self.device, self.dtype, [layer.dim for layer in shape.layers]
        )
        self._is_fp8 = shape.dtype == FP8
        self._no_rows = torch.zeros(0, dtype=torch.int64, device=self.device)
        if self._is_fp8 and self._uses_flash and self._decode_kernel is None:
            raise BadConfig(
                "kv_cache_dtype='fp8' needs Triton's kernels, which do not run here. Leave it out."
            )
        self._argmax = argmax
        self._no_logits = self._try_step()
        self._graphs: Graphs | None = None
        self._prefills: Repeats | None = None
        if uses_graphs and self._uses_flash:
            self._family.repeats = Repeats(Recorder(self.device, "encoder calls"))
            self._prefills = Repeats(Recorder(self.device, "prefills"))
            self._graphs = Graphs(
                self._step,
                self._choose,
                Recorder(self.device, "graphs"),
                max_num_seqs=max_num_seqs,
                max_rows=self._max_rows,
                scratch=self._slots.scratch,
                is_fixed=is_deterministic,
                draw=self._draw,
            )
            self._graphs.capture_all()

    @torch.inference_mode()
    def _try_step(self) -> Tensor:
        """
        One step that is nobody's: what does not work at all shows here, and not in every request.

        Returns:
            (0, vocab): none of the logits, but what they are like.

        Raises:
            BadConfig: the text model asks attention for something that is not built.
        """
        table = upload(self._slots.table([], 1), self.device)
        logits = self._step(table, 1, [0], [1])
        return logits.new_empty((0, logits.shape[1]))

    # --- pictures ----------------------------------------------------------------------------------

    def encode(self, sequences: Many[Sequence]) -> None:
        """Give every sequence the features that its prompt's next piece reads, once."""
        # By whose they are and which: outputs of one request share a dict of features.
        missing = {
            (id(sequence.features), index): (sequence, placed.content)
            for sequence in sequences
            for index, placed in enumerate(sequence.prepared.media)
            if index not in sequence.features
            and placed.rows[0] < sequence.num_read
            and placed.rows[-1] >= sequence.num_computed
        }
        visuals = [content for _, content in missing.values() if isinstance(content, Visual)]
        encoded = iter(self._encode(visuals))
        # NOTE: only now, so that a call that fails can be repeated.
        for (_, index), (sequence, content) in missing.items():
            if isinstance(content, Tensor):
                sequence.features[index] = content.to(self.device, self.dtype)
                continue
            sequence.features[index], is_fresh = next(encoded)
            if is_fresh:
                sequence.encoded.add(index)

    def _encode(self, visuals: Many[Visual]) -> list[tuple[Tensor, bool]]:
        """
        Features of each, and whether the encoder ran for it: equal ones are encoded once, and those in
        the cache not at all.
        """
        known: dict[bytes, Tensor | None] = {}
        unknown: list[Visual] = []
        for visual in visuals:
            if visual.key is None:
                unknown.append(visual)
            elif visual.key not in known:
                known[visual.key] = self.cache.find(visual.key)
                if known[visual.key] is None:
                    unknown.append(visual)
        # Equal sizes stand together in one call: they may be dense batches, and come back as they are.
        unknown.sort(key=_size_of)
        fresh: dict[int, Tensor] = {}
        for call in _calls([visual.plan.num_patches for visual in unknown], self._max_patches):
            picked = [unknown[i] for i in call]
            num_patches = sum(visual.plan.num_patches for visual in picked)
            with self.meter.span(Work.ENCODE, num_patches):
                features = self._family.encode(picked)
            for visual, feature in zip(picked, features, strict=True):
                fresh[id(visual)] = feature
                if visual.key is not None:
                    known[visual.key] = feature
                    self.cache.keep(visual.key, feature)
        found = []
        for visual in visuals:
            of_visual = fresh.get(id(visual), None if visual.key is None else known[visual.key])
            assert of_visual is not None, "a picture that is left out would shift all behind it"
            found.append((of_visual, id(visual) in fresh))
        return found

    # --- prompts -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def copy_prefixes(self, sequences: Many[Sequence]) -> None:
        """
        Copy the rows that these begin with from the slabs where they are.

        In each layer all are read before any is written: one's old place may be another's new one.
        """
        pairs = [
            np.array([[_copied_from(s)], [_start(s)]]) + np.arange(s.num_cached) for s in sequences
        ]
        sources, targets = upload(np.concatenate(pairs, axis=1), self.device)
        with self.meter.span(Work.PREFILL, 0):
            for rows in (*self._rows.keys, *self._rows.values):
                copy_(rows, sources, targets)

    @torch.inference_mode()
    def prefill(self, sequences: Many[Sequence]) -> Tensor:
        """
        Run prompts, or the pieces of them that are scheduled, packed, and write their rows.

        Returns:
            Logits after the last token of each prompt that is read to its end: (num_read, vocab).
        """
        self.encode(sequences)
        num_tokens = sum(sequence.num_scheduled for sequence in sequences)
        with self.meter.span(Work.PREFILL, num_tokens):
            return self._prefill(sequences)

    def _prefill(self, sequences: Many[Sequence]) -> Tensor:
        num_queries = [sequence.num_scheduled for sequence in sequences]
        lens = [sequence.num_read for sequence in sequences]
        starts = [_start(sequence) for sequence in sequences]
        first_rows = np.cumsum([0, *num_queries])
        num_tokens = int(first_rows[-1])
        num_places, num_spans = num_tokens, len(sequences)
        most, most_rows = max(num_queries), max(lens)
        both_ways = self._find_both_ways(sequences)
        if self._prefills is not None and not both_ways:  # rounded up, sizes come back
            # Empty prompts, and blocks behind the end of one, cost next to nothing.
            num_places = max(num_tokens, min(round_up(num_tokens), self._max_prefill_tokens))
            num_spans = power_up(num_spans, 64)
            most, most_rows = power_up(most, 1024), power_up(most_rows, 1024)
        # One table goes up: ids, the axes of positions, and rows to write. What fills it up
        # writes to scratch, and no sequence looks at it.
        table = np.zeros((2 + self._num_axes, num_places), dtype=np.int64)
        places, features = [], []
        for sequence, first, start in zip(sequences, first_rows[:-1].tolist(), starts, strict=True):
            begin, end = sequence.num_computed, sequence.num_read
            columns = slice(first, first + end - begin)
            table[0, columns] = sequence.prepared.token_ids[begin:end]
            table[1:-1, columns] = sequence.prepared.positions[:, begin:end]
            table[-1, columns] = np.arange(start + begin, start + end)
            for index, placed in enumerate(sequence.prepared.media):
                inside = placed.rows_in(begin, end)
                if inside.start < inside.stop:
                    places.append(first - begin + placed.rows[inside])
                    features.append(sequence.features[index][inside])
        read = [index for index, sequence in enumerate(sequences) if sequence.is_read]
        ends = np.zeros(num_spans, dtype=np.int64)  # what fills it up reads the first token
        ends[: len(read)] = first_rows[1:][read] - 1
        on_device = upload(table, self.device)
        x = self._embed(on_device[0])
        extras = None
        if features:
            rows, joined = upload(np.concatenate(places), self.device), torch.cat(features)
            x.index_copy_(0, rows, joined[:, : x.shape[1]])
            extras = _spread(joined[:, x.shape[1] :], rows, x)
        if self._uses_flash and not both_ways:
            read_rows = self._no_rows
            if self._is_fp8:
                read_rows, starts = self._gather(starts, lens)
            spans = self._device_spans(starts, num_queries, lens, num_spans)
            inputs = [x, on_device[1:], spans, read_rows, upload(ends, self.device)]
            if extras is not None:
                inputs.append(extras)
            layers = partial(self._prefill_layers, most=most, most_rows=most_rows)
            if self._prefills is None:
                hidden = layers(*inputs)
            else:
                key = num_places, num_spans, most, most_rows, len(read_rows), len(inputs)
                hidden = self._prefills.run(key, layers, *inputs)
        else:
            context = TextContext(
                self._rows.keys,
                self._rows.values,
                on_device[-1],
                starts,
                lens,
                num_queries,
                extras=extras,
                both_ways=both_ways,
                ends=Ends(upload(ends[: max(1, len(read))], self.device)),  # no call is of no rows
            )
            hidden = self._forward(x, on_device[1:-1], context)
        for index in read:
            # Another dict: outputs without rows yet still need the old one.
            sequences[index].features = {}
        return self._head(hidden[: len(read)])  # type: ignore[no-any-return]

    def _find_both_ways(self, sequences: Many[Sequence]) -> list[list[tuple[int, int]]]:
        """`TextContext.both_ways` of these prompts, or of their pieces."""
        found = [
            [
                (first - sequence.num_computed, last - sequence.num_computed)
                for first, last in sequence.both_ways
                if sequence.num_computed <= first < sequence.num_read
            ]
            for sequence in sequences
        ]
        return found if any(found) else []

    def _prefill_layers(
        self,
        x: Tensor,
        table: Tensor,
        spans: Tensor,
        read_rows: Tensor,
        ends: Tensor,
        extras: Tensor | None = None,
        *,
        most: int,
        most_rows: int,
    ) -> Tensor:
        """
        All of a prefill between embedding and head, reading nothing of the host's.

        Args:
            x: (T, hidden). table: (num_axes + 1, T), int64: positions, and rows to write.
            spans: (3, num_seqs + 1), int32, of `_device_spans`.
            read_rows: (rows,), int64, of `_gather`; none where slabs are read where they lie.
            ends: (n,), int64: the tokens whose results are wanted.
            extras: (num_layers, T, hidden), of `_spread`.
            most: no prompt, or piece of one, is longer. most_rows: nor with what came before it.

        Returns:
            (n, hidden).
        """
        context = TextContext(
            self._rows.keys,
            self._rows.values,
            table[-1],
            (),
            (),
            (),
            (spans[0], spans[1], spans[2, :-1]),
            max_queries=most,
            max_rows=most_rows,
            prefill_kernel=self._prefill_kernel,
            read_rows=read_rows if len(read_rows) else None,
            extras=extras,
            ends=Ends(ends),
        )
        return self._forward(x, table[:-1], context)

    # --- tokens ------------------------------------------------------------------------------------

    @property
    def draws(self) -> bool:
        """
        Whether `replay` draws tokens. Asked only when some are to be drawn: see `draw.is_usable`.

        Without the kernel a GPU would sort a vocabulary for each token, however few are drawn from.
        """
        return self.device.type == "cpu" or draw.is_usable(self._no_logits)

    @torch.inference_mode()
    def replay(
        self, sequences: Many[Sequence], *, keeps_logits: bool, draws: bool = False
    ) -> Replayed | None:
        """
        `decode` as one CUDA graph, with tokens chosen and kept; None where there is none.

        Args:
            keeps_logits: whether somebody will look at them; what is chosen here needs none.
            draws: whether tokens are drawn, as each sequence has it, and not the likeliest ones. Only
                where the runner `draws` at all.
        """
        size = self._graphs.find_size(len(sequences)) if self._graphs else None
        if size is None or self._graphs is None:
            return None
        table = self._next_table(sequences, size, draws=draws)
        graph = self._graphs.find(table, keeps_logits=keeps_logits)
        if graph is None:
            return None
        with self.meter.span(Work.DECODE, len(sequences)):
            return self._graphs.replay(graph, table, len(sequences))

    def _next_table(self, sequences: Many[Sequence], size: int, *, draws: bool = False) -> Table:
        """
        `Slots.table`, with `draw.table` behind it where tokens are drawn.

        Where the batch is the one of the step before, everybody is a token further.
        """
        before, table, num_launched = self._last_table
        is_known = sequences == before and sequences[0].num_launched == num_launched + 1
        if is_known and draws == (len(table) > NUM_COLUMNS):
            table[_COUNTING if draws else _COUNTING[:3], : len(sequences)] += 1
        else:
            table = self._slots.table(sequences, size)
            if draws:
                numbers = [sequence.draw_numbers for sequence in sequences]
                positions = [sequence.num_launched for sequence in sequences]
                table = np.concatenate((table, draw.table(numbers, positions, size)))
        self._last_table = list(sequences), table, sequences[0].num_launched
        return table

    @torch.inference_mode()
    def decode(self, sequences: Many[Sequence]) -> Tensor:
        """
        Run the newest token of each sequence, and write its row.

        Returns:
            Logits for the next token: (num_seqs, vocab).
        """
        with self.meter.span(Work.DECODE, len(sequences)):
            size = self._num_places or len(sequences)
            calls = [sequences[at : at + size] for at in range(0, len(sequences), size)]
            logits = [self._decode(call, size) for call in calls]
            return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _decode(self, sequences: Many[Sequence], num_places: int) -> Tensor:
        table = self._slots.table(sequences, num_places)
        starts, lens = table[START].tolist(), table[LEN].tolist()
        most = max(lens) if self._num_places is None else self._max_rows
        logits = self._step(upload(table, self.device), most, starts, lens)
        return logits[: len(sequences)]

    @torch.inference_mode()
    def keep(self, sequences: Many[Sequence], token_ids: Tensor) -> None:
        """Let the next step of these sequences begin with these tokens: (num_seqs,), int64, device."""
        slots = np.array([sequence.slot for sequence in sequences], dtype=np.int64)
        self._slots.keep(upload(slots, self.device), token_ids)

    def _step(
        self, table: Tensor, max_rows: int, starts: Many[int] = (), lens: Many[int] = ()
    ) -> Tensor:
        """
        One decode step over a table of `Slots.table` on the device, at most max_rows rows each.

        Args:
            starts, lens: the same on the host, for the loops of a CPU.
        """
        num = table.shape[1]
        spans = None
        if self._uses_flash:
            query_starts = torch.arange(num + 1, dtype=torch.int32, device=self.device)
            slab_starts = torch.nn.functional.pad(table[START].to(torch.int32), (0, 1))
            spans = (query_starts, slab_starts, table[LEN].to(torch.int32))
        context = TextContext(
            self._rows.keys,
            self._rows.values,
            table[WRITE_ROW],
            starts,
            lens,
            [1] * len(lens),
            spans,
            max_queries=1,
            max_rows=max_rows,
            decode_kernel=self._decode_kernel,
        )
        x = self._embed(self._slots.tokens[table[SLOT]])
        hidden = self._forward(x, table[POSITION].expand(self._num_axes, -1), context)
        return self._head(hidden)  # type: ignore[no-any-return]

    def _choose(self, logits: Tensor, table: Tensor) -> Tensor:
        token_ids = self._argmax(logits)
        self._slots.keep(table[SLOT], token_ids)
        return token_ids

    def _draw(self, logits: Tensor, table: Tensor) -> Tensor:
        token_ids = draw.draw(logits, table[NUM_COLUMNS:])
        self._slots.keep(table[SLOT], token_ids)
        return token_ids

    def _forward(self, x: Tensor, positions: Tensor, context: TextContext) -> Tensor:
        """x: (T, hidden), positions: (num_axes, T) -> (T, hidden), or the context's ends alone."""
        by_sequence = positions if self._num_axes == 1 else positions[:, None]
        with using(context):
            output = self._text(inputs_embeds=x[None], position_ids=by_sequence, use_cache=False)
        hidden, ends = output.last_hidden_state, context.ends
        if ends is not None and not ends.are_cut:
            hidden = ends.cut(hidden)
        return hidden[0]  # type: ignore[no-any-return]

    def _gather(self, starts: Many[int], lens: Many[int]) -> tuple[Tensor, list[int]]:
        """
        The rows in use of these slabs, one behind the other, and where each slab begins there.

        Returns:
            (rows,), int64, device, as many as come back, the last of them scratch; and the places.
        """
        places = np.cumsum([0, *lens])
        num_rows = int(places[-1])
        rows = np.zeros(num_rows if self._prefills is None else round_up(num_rows), np.int64)
        rows[:num_rows] = np.concatenate(
            [np.arange(start, start + length) for start, length in zip(starts, lens, strict=True)]
        )
        return upload(rows, self.device), places[:-1].tolist()

    def _device_spans(
        self, starts: Many[int], num_queries: Many[int], lens: Many[int], num: int
    ) -> Tensor:
        """Where `num` prompts begin in the call and in the rows, and their lengths; see attention."""
        table: npt.NDArray[np.int32] = np.zeros((3, num + 1), dtype=np.int32)
        table[0, 1 : len(lens) + 1] = np.cumsum(num_queries)
        table[0, len(lens) + 1 :] = table[0, len(lens)]  # empty ones
        table[1, : len(lens)] = starts
        table[2, : len(lens)] = lens
        return upload(table, self.device)


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
    shape = checkpoint.kv_shape
    if kv_bytes is None:
        kv_bytes = max(CPU_KV_BYTES, least * shape.row_bytes)
        if checkpoint.device.type == "cuda":
            # Layers that were merged left blocks of their old weights, which look like memory in use.
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(checkpoint.device)
            # A tenth of the device stays free for the activations of encoder and prefill.
            kv_bytes = int(free - total * (1 - utilization) - total * 0.1)
    return max(0, min(most, kv_bytes // shape.row_bytes))


def _spread(deeper: Tensor, rows: Tensor, x: Tensor) -> Tensor | None:
    """
    What features add in later layers, in the places of their tokens; None where they add nothing.

    Args:
        deeper: (num_rows, num_layers * hidden). rows: (num_rows,), int64. x: (T, hidden).

    Returns:
        (num_layers, T, hidden), zero for all other tokens. As long as the call, not as the features:
        a recorded call then has one size less to come back.
    """
    if not deeper.shape[1]:
        return None
    by_layer = deeper.view(len(deeper), -1, x.shape[1]).transpose(0, 1)
    return x.new_zeros(len(by_layer), *x.shape).index_copy_(1, rows, by_layer)


def _size_of(visual: Visual) -> tuple[int, int]:
    _, height_px, width_px, _ = visual.pixels.shape
    return height_px * width_px, height_px


def _start(sequence: Sequence) -> int:
    assert sequence.start is not None, "a sequence runs only with a slab"
    return sequence.start


def _copied_from(sequence: Sequence) -> int:
    assert sequence.copied_from is not None
    return sequence.copied_from


def _calls(num_patches: Many[int], limit: int = MAX_ENCODER_PATCHES) -> list[list[int]]:
    """Cut a list of pictures into as few encoder calls as may be, about equally large."""
    num_calls = len(_fill(num_patches, math.inf, limit))
    return _fill(num_patches, sum(num_patches) / max(1, num_calls), limit)


def _fill(num_patches: Many[int], share: float, limit: int) -> list[list[int]]:
    """Calls within the limit, each of which ends where its share of all patches does."""
    calls: list[list[int]] = []
    total = of_call = 0
    for index, count in enumerate(num_patches):
        is_full = of_call + count > limit or total + count / 2 > len(calls) * share
        if not calls or (is_full and of_call):
            calls.append([])
            of_call = 0
        calls[-1].append(index)
        of_call += count
        total += count
    return calls
