"""
Train darkroom-tiny from nothing, in slices: `python -m models.train.train --minutes 20 --out DIR`.

A slice ends after its minutes and leaves `state.pt` (weights, optimiser, step, time spent); the next
one goes on from there. The learning rate falls along a cosine over the minutes planned in all, so
the schedule is the same on a fast and on a slow machine. With every `state.pt` goes the checkpoint's
`model.safetensors`, of use at once.

On a GPU one whole step (forward, backward, optimiser) is recorded as a CUDA graph and replayed.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from models.train.export import unpublished, write_weights
from models.train.marks import NUM_MARKS
from models.train.network import TextLayer, TinyQwen2VL, VisionBlock
from models.train.optimiser import Weights
from models.train.packing import (
    KINDS,
    SMALL_ROOM,
    Encoder,
    Packed,
    PackedBatches,
    Plan,
    Room,
    packed_batch,
)
from models.train.photos import HELD_OUT_PHOTOS

FOLDER = Path(__file__).parents[1] / "darkroom-tiny"
WARM_UP_STEPS = 300
MARKS_WEIGHT = 0.5
KIND_WEIGHTS = {"word": 2.0}  # of a token of an answer; 1 for all other kinds
SAVE_EVERY_S = 45.0
EVALUATE_EVERY_S = 120.0
LOG_EVERY_STEPS = 200
MAX_AHEAD = 3  # recorded steps that the host may be ahead of the device
MIN_KEPT = 64  # batches to choose from before any is used again
FLOOR = 0.01  # share of the peak learning rate that is left at the end


def main() -> None:
    options = _options()
    sys.setswitchinterval(0.0005)  # the thread that receives batches must not stall the launches
    tokenizer_json = (FOLDER / "tokenizer.json").read_text()
    tokenizer = Tokenizer.from_str(tokenizer_json)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = TinyQwen2VL(-(-tokenizer.get_vocab_size() // 16) * 16, NUM_MARKS).to(device)
    weights = Weights(model, device, use_muon=not options.adam)
    progress = {"step": 0, "drawn": 0, "spent_s": 0.0}
    options.out.mkdir(parents=True, exist_ok=True)
    if (options.out / "state.pt").is_file():
        saved = torch.load(options.out / "state.pt", map_location=device, weights_only=True)
        weights.load_state(saved["weights"])
        progress = saved["progress"]
    elif options.start_from:
        weights.load(unpublished(load_file(options.start_from)))
    if options.compile:
        _compile_blocks()
    plan = Plan(options.easy, tuple(options.kinds), SMALL_ROOM if options.small else Room())
    replay = Replay(
        _stream(tokenizer_json, plan, options, int(progress["drawn"])), device, options.uses
    )
    unseen = replace(plan, names=HELD_OUT_PHOTOS)
    held_out = [
        packed_batch(Encoder(tokenizer), f"held-out/{index}", unseen).each(lambda t: t.to(device))
        for index in range(options.eval_batches)
    ]
    _train(model, weights, replay, held_out, progress, options, plan.room)
    _save(weights, progress, options.out)
    print(json.dumps({"exact": teacher_forced(model, held_out, plan.room), **progress}), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of state.pt")
    parser.add_argument("--minutes", type=float, required=True, help="how long this slice runs")
    parser.add_argument("--minutes-in-all", type=float, required=True, help="what the cosine spans")
    parser.add_argument("--peak", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--adam", action="store_true", help="Adam for matrices too")
    parser.add_argument("--uses", type=int, default=3, help="how often each batch is used")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--seed", default="train", help="which stream of drawings")
    parser.add_argument("--kinds", nargs="*", default=[], choices=KINDS, help="only these kinds")
    parser.add_argument("--easy", type=int, default=0, help="batches till all samples are hard")
    parser.add_argument(
        "--small", action="store_true", help="batches of a sixteenth of the size, for a CPU"
    )
    parser.add_argument("--start-from", help="weights (safetensors) of an earlier run")
    parser.add_argument("--compile", action="store_true", help="fuse the blocks by torch.compile")
    parser.add_argument("--eval-batches", type=int, default=4)
    parser.add_argument("--log-every", type=int, default=LOG_EVERY_STEPS, help="steps")
    options = parser.parse_args()
    if options.seed.startswith("held-out"):
        parser.error("--seed: what begins with held-out is kept for the evaluation")
    return options


def _compile_blocks() -> None:
    """One compilation for all blocks of a kind, since their shapes are the same and never change."""
    for block in (VisionBlock, TextLayer):
        for half in ("before", "after"):
            setattr(block, half, torch.compile(getattr(block, half), dynamic=False))


def _stream(
    tokenizer_json: str, plan: Plan, options: argparse.Namespace, start: int
) -> Iterator[Packed]:
    loader = DataLoader(
        PackedBatches(tokenizer_json, options.seed, plan, start),
        batch_size=None,
        num_workers=options.workers,
        prefetch_factor=2 if options.workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


# --- one step ----------------------------------------------------------------------------------------


def losses_of(model: TinyQwen2VL, batch: Packed, room: Room) -> tuple[Tensor, Tensor]:
    """Nats of each token of the answers, 0 for filler; and nats a visual token of the marks."""
    features = model.features(batch, room)
    hidden = model.hidden(batch, features, room).index_select(0, batch.learnt_rows)
    answers = F.cross_entropy(model.logits(hidden).float(), batch.learnt_ids, reduction="none")
    logits = model.mark_head(features).float()
    wanted = logits.new_zeros(len(logits) + 1, NUM_MARKS)
    wanted.view(-1).scatter_(0, batch.mark_rows * NUM_MARKS + batch.mark_numbers, 1.0)
    marks = F.binary_cross_entropy_with_logits(logits, wanted[:-1], reduction="none").sum(1)
    marked = batch.marked.float()
    return answers, (marks * marked).sum() / marked.sum().clamp(min=1)


class Step:
    """
    One step on whatever batch it is given; recorded on a GPU, so that it costs the host one launch.

    Attributes:
        sums: (len(KINDS) + 1, 2), float32: nats and tokens of each kind since the last reading,
            then nats of marks and number of steps.
    """

    def __init__(self, model: TinyQwen2VL, weights: Weights, example: Packed, room: Room) -> None:
        device = example.ids.device
        self.model, self.weights, self.room = model, weights, room
        self.batch = example.each(Tensor.clone)
        self.sums = torch.zeros(len(KINDS) + 1, 2, device=device)
        self._token_weights = torch.tensor(
            [KIND_WEIGHTS.get(kind, 1.0) for kind in KINDS], device=device
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._record()

    def _record(self) -> None:
        """Rehearse without learning anything (the rate is zero), then record."""
        before = {name: tensor.clone() for name, tensor in self.weights.state().items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._run()
        self.weights.load_state(before)
        self.sums.zero_()

    def _run(self) -> None:
        batch = self.batch
        self.weights.clear_grad()
        answers, marks = losses_of(self.model, batch, self.room)
        learnt = (batch.learnt_ids >= 0).float()
        weight = self._token_weights[batch.kind] * learnt
        ((answers * weight).sum() / weight.sum() + MARKS_WEIGHT * marks).backward()
        self.weights.step()
        found = torch.stack((answers.detach(), torch.ones_like(answers)), dim=1) * learnt[:, None]
        self.sums[:-1].index_add_(0, batch.kind, found)
        self.sums[-1, 0] += marks.detach()
        self.sums[-1, 1] += 1

    def __call__(self, batch: Packed, rate: float) -> None:
        self.weights.rate.fill_(rate)
        torch._foreach_copy_(self.batch.tensors(), batch.tensors())
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()

    def read(self) -> dict[str, float]:
        """Mean nats of each kind since the last reading; waits for the device."""
        names = (*KINDS, "marks")
        found = {
            name: round(total / count, 4)
            for name, (total, count) in zip(names, self.sums.tolist(), strict=True)
            if count
        }
        self.sums.zero_()
        return found


# --- the run -----------------------------------------------------------------------------------------


def _train(
    model: TinyQwen2VL,
    weights: Weights,
    replay: "Replay",
    held_out: list[Packed],
    progress: dict[str, Any],
    options: argparse.Namespace,
    room: Room,
) -> None:
    begun, spent_before, drawn_before = time.monotonic(), progress["spent_s"], progress["drawn"]
    step = Step(model, weights, replay.next(), room)
    print(f"ready after {time.monotonic() - begun:.0f} s", flush=True)
    begun = saved_at = evaluated_at = logged_at = time.monotonic()
    behind = _Behind(weights.rate.device)
    while time.monotonic() - begun < options.minutes * 60:
        progress["spent_s"] = spent_before + time.monotonic() - begun
        share = progress["spent_s"] / (options.minutes_in_all * 60)
        rate = options.peak * _share(progress["step"], share)
        step(replay.next(), rate)
        behind.wait()
        progress["step"] += 1
        progress["drawn"] = drawn_before + replay.num_drawn
        now = time.monotonic()
        if progress["step"] % options.log_every == 0:
            print(
                f"step={progress['step']} s={progress['spent_s']:.0f} drawn={progress['drawn']} "
                f"rate={rate:.2e} norm={weights.norm.item():.2f} "
                f"skipped={weights.num_skipped.item():.0f} "
                f"steps/s={options.log_every / (now - logged_at):.1f} "
                f"waiting={replay.waited_s / (now - logged_at):.2f} {step.read()}",
                flush=True,
            )
            logged_at, replay.waited_s = now, 0.0
        if now - saved_at > SAVE_EVERY_S:
            _save(weights, progress, options.out)
            saved_at = now
        if now - evaluated_at > EVALUATE_EVERY_S and held_out:
            print(f"exact: {teacher_forced(model, held_out, room)}", flush=True)
            evaluated_at = time.monotonic()


class _Behind:
    """Keeps the host from running far ahead of the device, whose work it would only pile up."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        self._is_needed = device.type == "cuda"

    def wait(self) -> None:
        if not self._is_needed:
            return
        event = torch.cuda.Event()
        event.record()
        self._events.append(event)
        if len(self._events) > MAX_AHEAD:
            self._events.pop(0).synchronize()


def _share(step: float, progress: float) -> float:
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    return warm * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@torch.no_grad()
def teacher_forced(model: TinyQwen2VL, batches: list[Packed], room: Room) -> dict[str, float]:
    """Share of held-out answers of which every token is the model's first choice, by kind."""
    right, total = [torch.zeros(len(KINDS)) for _ in range(2)]
    for batch in batches:
        hidden = model.hidden(batch, model.features(batch, room), room)
        said = model.logits(hidden.index_select(0, batch.learnt_rows)).argmax(-1)
        missed = ((said != batch.learnt_ids) & (batch.learnt_ids >= 0)).float().cpu()
        kind, answer = batch.kind.cpu(), batch.answer.cpu()
        misses = torch.zeros(room.asked + 1).index_add_(0, answer, missed)
        kind_of = torch.zeros(room.asked + 1, dtype=torch.int64).index_copy_(0, answer, kind)
        asked = answer[batch.learnt_ids.cpu() >= 0].unique()
        total.index_add_(0, kind_of[asked], torch.ones(len(asked)))
        right.index_add_(0, kind_of[asked], (misses[asked] == 0).float())
    return {
        kind: round((right[index] / total[index]).item(), 4)
        for index, kind in enumerate(KINDS)
        if total[index]
    }


class Replay:
    """
    Batches from the stream, each handed out several times: drawing costs more than learning.

    A batch comes back at random among the last ones drawn, and waits on the device meanwhile.
    """

    def __init__(self, stream: Iterator[Packed], device: torch.device, uses: int) -> None:
        self.stream, self.device, self.uses = stream, device, uses
        self.num_drawn = self.num_used = 0
        self.waited_s = 0.0
        self._kept: list[tuple[Packed, int]] = []
        self._rng = random.Random(0)

    def next(self) -> Packed:
        self.num_used += 1
        if self.num_used % self.uses == 0 or len(self._kept) < MIN_KEPT:
            return self._draw()
        index = self._rng.randrange(len(self._kept))
        batch, uses_left = self._kept.pop(index)
        if uses_left > 1:
            self._kept.append((batch, uses_left - 1))
        return batch

    def _draw(self) -> Packed:
        before = time.monotonic()
        batch = next(self.stream).each(lambda t: t.to(self.device, non_blocking=True))
        self.waited_s += time.monotonic() - before
        self.num_drawn += 1
        if self.uses > 1:
            self._kept.append((batch, self.uses - 1))
        return batch


def _save(weights: Weights, progress: dict[str, Any], folder: Path) -> None:
    part = folder / "state.part"
    torch.save({"weights": weights.state(), "progress": progress}, part)
    part.replace(folder / "state.pt")
    write_weights(folder, weights.named())


if __name__ == "__main__":
    main()
