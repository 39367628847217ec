"""
Train darkroom-tiny from nothing, in slices: `python -m models.train.train --minutes 20 --out DIR`.

A slice ends after its minutes and leaves `state.pt` (weights, optimiser, step, time spent); the next
one goes on from there. The learning rate falls along a cosine over the minutes planned in all, so
the schedule is the same on a fast and on a slow machine. With every `state.pt` goes the checkpoint's
`model.safetensors`, of use at once. On several GPUs: `torchrun --nproc-per-node=N -m ...`, where
every process draws its own part of the same stream.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from models.train.corpus import (
    PATCHES_IN_MICRO_BATCH,
    SCHEDULE,
    Encoder,
    MicroBatch,
    MicroBatches,
    Plan,
    micro_batch,
)
from models.train.export import unpublished, write_weights
from models.train.marks import LABELS
from models.train.network import TinyQwen2VL

FOLDER = Path(__file__).parents[1] / "darkroom-tiny"
WARM_UP_STEPS = 250
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.05
MAX_GRADIENT_NORM = 1.0
MARKS_WEIGHT = 0.5
SAVE_EVERY_S = 60.0
LOG_EVERY_STEPS = 50
MIN_KEPT = 24  # micro-batches to choose from before any is used again
FLOOR = 0.02  # share of the peak learning rate that is left at the end


def main() -> None:
    options = _options()
    sys.setswitchinterval(0.0005)  # the thread that receives batches must not stall the launches
    tokenizer_json = (FOLDER / "tokenizer.json").read_text()
    tokenizer = Tokenizer.from_str(tokenizer_json)
    rank, num_ranks = _join()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    num_tokens = -(-tokenizer.get_vocab_size() // 16) * 16
    model = TinyQwen2VL(num_tokens, len(LABELS)).to(device)
    weights = Weights(model, device)
    state = {"step": 0, "consumed": 0, "spent_s": 0.0}
    if (options.out / "state.pt").is_file():
        saved = torch.load(options.out / "state.pt", map_location=device, weights_only=True)
        weights.load(saved["model"])
        weights.optimiser.load_state_dict(saved["optimiser"])
        state = saved["progress"]
    elif options.start_from:
        from safetensors.torch import load_file

        weights.load(unpublished(load_file(options.start_from)))
    if options.compile:
        for block in [*model.model.visual.blocks, *model.model.language_model.layers]:
            block.compile(dynamic=True)
    options.out.mkdir(parents=True, exist_ok=True)
    stream = _stream(tokenizer_json, options, int(state["consumed"]), rank, num_ranks)
    _train(model, weights, stream, state, options, device)
    if rank != 0:
        return
    _save(weights, state, options.out)
    report = {
        kind: teacher_forced(model, tokenizer, kind, options.eval_batches, device, options.patches)
        for kind in dict.fromkeys(options.kinds)
        if options.eval_batches
    }
    print(json.dumps({"teacher_forced_exact": report, **state}), flush=True)


def _join() -> tuple[int, int]:
    """This process's number on its machine, and how many train together."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return int(os.environ.get("LOCAL_RANK", "0")), num_ranks


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of state.pt")
    parser.add_argument("--minutes", type=float, required=True, help="how long this slice runs")
    parser.add_argument("--minutes-in-all", type=float, required=True, help="what the cosine spans")
    parser.add_argument("--peak", type=float, default=8e-4, help="peak learning rate")
    parser.add_argument("--accumulate", type=int, default=3, help="micro-batches a step")
    parser.add_argument("--uses", type=int, default=4, help="how often each micro-batch is used")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--seed", default="train", help="which stream of drawings")
    parser.add_argument("--kinds", nargs="+", default=SCHEDULE, help="of micro-batches, in turn")
    parser.add_argument("--easy", type=int, default=0, help="micro-batches till all are hard")
    parser.add_argument("--patches", type=int, default=PATCHES_IN_MICRO_BATCH)
    parser.add_argument("--start-from", help="weights (safetensors) of an earlier run")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    parser.add_argument("--eval-batches", type=int, default=8)
    return parser.parse_args()


class Weights:
    """The float32 weights that the optimiser moves; the model computes with a bfloat16 copy of them."""

    def __init__(self, model: TinyQwen2VL, device: torch.device) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.exact = [p.detach().clone().float() for p in model.parameters()]
        for module in model.modules():  # the tables of angles and pixel means stay float32
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(parameter.detach().bfloat16()))
        self.rounded = list(model.parameters())
        self.num_skipped = 0
        groups = [
            {"params": [p for p in self.exact if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in self.exact if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=device.type == "cuda")

    def step(self, rate: float) -> float:
        """
        Move the weights along the gradients; returns the gradients' norm before clipping.

        A norm that is not finite moves nothing: one bad step would end the whole run.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        for exact, rounded in zip(self.exact, self.rounded, strict=True):
            exact.grad = torch.zeros_like(exact) if rounded.grad is None else rounded.grad.float()
            rounded.grad = None
        if dist.is_initialized():
            flat = torch.cat([exact.grad.flatten() for exact in self.exact])  # type: ignore[union-attr]
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            pieces = flat.split([exact.numel() for exact in self.exact])
            for exact, piece in zip(self.exact, pieces, strict=True):
                exact.grad = piece.view_as(exact)
        norm = torch.nn.utils.clip_grad_norm_(self.exact, MAX_GRADIENT_NORM).item()
        if math.isfinite(norm):
            self.optimiser.step()
            self.round()
        else:
            self.num_skipped += 1
        return norm

    @torch.no_grad()
    def round(self) -> None:
        torch._foreach_copy_([p.data for p in self.rounded], self.exact)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        for name, exact in zip(self.names, self.exact, strict=True):
            if name in weights:  # a checkpoint has no head for the marks
                exact.copy_(weights[name])
        self.round()

    def named(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.exact, strict=True))


def _stream(
    tokenizer_json: str, options: argparse.Namespace, start: int, rank: int, num_ranks: int
) -> Iterator[MicroBatch]:
    loader = DataLoader(
        MicroBatches(
            tokenizer_json,
            options.seed,
            Plan(tuple(options.kinds), options.easy, options.patches),
            range(start * num_ranks + rank, sys.maxsize, num_ranks),
        ),
        batch_size=None,
        num_workers=options.workers,
        prefetch_factor=4 if options.workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def _train(
    model: TinyQwen2VL,
    weights: Weights,
    stream: Iterator[MicroBatch],
    state: dict[str, float],
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    begun, spent_before = time.monotonic(), state["spent_s"]
    saved_at = logged_at = begun
    replay = Replay(stream, device, options.uses)
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    drawn_before, pictures = state["consumed"], 0
    losses: dict[str, list[Tensor]] = defaultdict(list)
    while _goes_on(time.monotonic() - begun < options.minutes * 60, device):
        state["spent_s"] = spent_before + time.monotonic() - begun
        rate = options.peak * _share(
            state["step"], state["spent_s"] / (options.minutes_in_all * 60)
        )
        for _ in range(options.accumulate):
            batch = replay.next()
            answers, marks = losses_of(model, batch)
            ((answers + MARKS_WEIGHT * marks) / options.accumulate).backward()
            losses[batch.kind].append(answers.detach())
            losses["marks"].append(marks.detach())
            pictures += batch.num_pictures
        state["consumed"] = drawn_before + replay.num_drawn
        norm = weights.step(rate)
        state["step"] += 1
        now = time.monotonic()
        if state["step"] % LOG_EVERY_STEPS == 0 and is_first:
            facts = {
                kind: round(torch.stack(found).nanmean().item(), 4)
                for kind, found in losses.items()
            }
            bad = {k: int(torch.stack(f).isnan().sum()) for k, f in losses.items()}
            if any(bad.values()):
                print(f"not a number: {bad}", flush=True)
            seconds = now - logged_at
            print(
                f"step={state['step']} s={state['spent_s']:.0f} rate={rate:.2e} norm={norm:.2f} "
                f"skipped={weights.num_skipped} pictures/s={pictures / seconds:.0f} waiting={replay.waited_s / seconds:.2f} {facts}",
                flush=True,
            )
            logged_at, replay.waited_s, pictures = now, 0.0, 0
            losses.clear()
        if now - saved_at > SAVE_EVERY_S and is_first:
            _save(weights, state, options.out)
            saved_at = now


def _goes_on(has_time: bool, device: torch.device) -> bool:
    """Whether there is time for another step; the first process decides for all."""
    if not dist.is_initialized():
        return has_time
    decided = torch.tensor([float(has_time)], device=device)
    dist.broadcast(decided, src=0)
    return bool(decided.item())


def _share(step: float, progress: float) -> float:
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    return warm * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _logits(model: TinyQwen2VL, batch: MicroBatch, features: Tensor | None) -> Tensor:
    """(learnt tokens, vocabulary), float32."""
    hidden = model.hidden(
        batch.ids, batch.positions, batch.branch, features, batch.placeholder_rows
    )
    return model.logits(hidden.flatten(0, 1).index_select(0, batch.learnt_rows)).float()


def losses_of(model: TinyQwen2VL, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Nats a token of the answers, and nats a visual token of the marks."""
    features = model.features(batch.groups)
    answers = F.cross_entropy(_logits(model, batch, features), batch.learnt_ids)
    if features is None or not len(batch.marked_rows):
        return answers, torch.zeros_like(answers)
    logits = model.mark_head(features.index_select(0, batch.marked_rows)).float()
    wanted = torch.zeros_like(logits)
    wanted[batch.marks[:, 0], batch.marks[:, 1]] = 1.0
    marks = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / len(logits)
    return answers, marks


@torch.no_grad()
def teacher_forced(
    model: TinyQwen2VL,
    tokenizer: Tokenizer,
    kind: str,
    num_batches: int,
    device: torch.device,
    num_patches: int,
) -> float:
    """Share of held-out answers of which every token is the model's first choice."""
    encoder, right, total = Encoder(tokenizer), 0, 0
    for index in range(num_batches):
        batch = micro_batch(encoder, f"held-out/{index}", kind, num_patches=num_patches)
        moved = batch.each(lambda tensor: tensor.to(device))
        missed = (
            _logits(model, moved, model.features(moved.groups)).argmax(-1) != moved.learnt_ids
        ).cpu()
        _, answer = batch.answer.unique(return_inverse=True)
        misses = torch.zeros(int(answer.max()) + 1).index_add_(0, answer, missed.float())
        right += int((misses == 0).sum())
        total += len(misses)
    return right / total


class Replay:
    """
    Micro-batches from the stream, each handed out several times: drawing costs more than learning.

    A micro-batch comes back at random among the last ones drawn, never at once, and waits on the
    device meanwhile.
    """

    def __init__(self, stream: Iterator[MicroBatch], device: torch.device, uses: int) -> None:
        self.stream, self.device, self.uses = stream, device, uses
        self.num_drawn = self.num_used = 0
        self.waited_s = 0.0
        self._kept: list[tuple[MicroBatch, int]] = []
        self._rng = random.Random(0)

    def next(self) -> MicroBatch:
        self.num_used += 1
        if self.num_used % self.uses == 0 or len(self._kept) < MIN_KEPT * (self.uses > 1):
            return self._draw()
        if not self._kept:
            return self._draw()
        index = self._rng.randrange(len(self._kept))
        batch, uses_left = self._kept.pop(index)
        if uses_left > 1:
            self._kept.append((batch, uses_left - 1))
        return batch

    def _draw(self) -> MicroBatch:
        before = time.monotonic()
        batch = next(self.stream).each(lambda t: t.to(self.device, non_blocking=True))
        self.waited_s += time.monotonic() - before
        self.num_drawn += 1
        if self.uses > 1:
            self._kept.append((batch, self.uses - 1))
        return batch


def _save(weights: Weights, state: dict[str, float], folder: Path) -> None:
    part = folder / "state.part"
    torch.save(
        {
            "model": weights.named(),
            "optimiser": weights.optimiser.state_dict(),
            "progress": state,
        },
        part,
    )
    part.replace(folder / "state.pt")
    write_weights(folder, weights.named())


if __name__ == "__main__":
    main()
