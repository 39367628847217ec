"""
Batches of samples, packed without padding between them into tensors of fixed sizes.

Pictures of all sizes stand behind one another in one row of patches, and all texts in one row of
tokens: first every sample's shared part (what stands before the question, pictures included), then
every turn. A turn sees its sample's shared part and itself, never another turn, so one drawing
teaches several answers at the price of one. What is left over in a tensor is filler that belongs to
nobody. Because no shape ever changes, a training step can be recorded once and replayed.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from engine.families.qwen2_vl import (
    MERGE,
    PATCH_PX,
    Grid,
    cut_patches,
    next_position,
    patch_positions,
    resample,
    target_size,
    token_positions,
)
from models.train import photos
from models.train.corpus import Sample, draw_sample, random_kind, spoken, system_turn
from models.train.marks import Mark, mark_number
from models.train.settings import AREA

KINDS = ("scene", "word", "photo", "images", "motion", "video", "text")
PATCH_VALUES = 3 * PATCH_PX**2
QUESTION_FIRST_SHARE = 0.2
NUMBERED_SHARE = 0.2

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Room:
    """
    How much one batch holds; a batch ends before the first sample that has no room.

    Attributes:
        patches: of the encoder, a multiple of 4. pairs: patches of second frames of a video.
        runs: pictures, and pairs of frames. run: patches of the largest picture.
        shared, turns: tokens of shared parts and of turns.
        samples, asked: how many samples, and how many turns. sample, turn: tokens of the longest
            shared part, and of the longest turn; `asked_of_one`: turns of one sample.
        learnt: tokens of answers. marks: of `marks.py`.
    """

    patches: int = 65_536
    pairs: int = 16_384
    runs: int = 768
    shared: int = 22_528
    turns: int = 24_576
    samples: int = 448
    asked: int = 1280
    learnt: int = 9216
    marks: int = 4096
    run: int = 256
    sample: int = 1280
    turn: int = 256
    asked_of_one: int = 6


SMALL_ROOM = Room(
    patches=4096,
    pairs=2048,
    runs=96,
    shared=2560,
    turns=2560,
    samples=48,
    asked=128,
    learnt=1024,
    marks=1024,
)


@dataclass(slots=True)
class Packed:
    """
    Tensors of one forward and backward pass. Sizes are those of `Room`; T = shared + turns.

    Attributes:
        patches: (patches, PATCH_VALUES), uint8; of a video, the first frame of each pair.
        seconds: (pairs, PATCH_VALUES), uint8; the second frames. second_rows: (pairs,) the patch
            that each belongs to; `patches` for filler.
        at: (patches, 2), row and column of each patch in its picture.
        run_starts: (runs + 1,), int32: where each picture's patches start; the last is `patches`.
        ids, axes: (T,) and (3, T): tokens and their M-RoPE positions.
        feature_rows: (patches / 4,): the token that takes each feature; T for filler.
        part_starts: (samples + asked + 1,), int32: where each shared part, then each turn starts.
        sample_starts, sample_turn_starts: (samples + 1,), int32: where each sample's shared part
            starts, and where its turns start, counted from the first turn of all.
        learnt_rows: (learnt,): tokens whose next token is learnt. learnt_ids: that next token; -100
            for filler. kind: (learnt,) number into KINDS. answer: (learnt,) number of the answer.
        marked: (patches / 4,), 1 where a feature is of a drawing.
        mark_rows, mark_numbers: (marks,): feature (`patches` / 4 for filler) and `marks.mark_number`.
    """

    patches: Tensor
    seconds: Tensor
    second_rows: Tensor
    at: Tensor
    run_starts: Tensor
    ids: Tensor
    axes: Tensor
    feature_rows: Tensor
    part_starts: Tensor
    sample_starts: Tensor
    sample_turn_starts: Tensor
    learnt_rows: Tensor
    learnt_ids: Tensor
    kind: Tensor
    answer: Tensor
    marked: Tensor
    mark_rows: Tensor
    mark_numbers: Tensor

    def tensors(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]

    def each(self, move: Callable[[Tensor], Tensor]) -> "Packed":
        """The same batch with every tensor moved."""
        return Packed(*map(move, self.tensors()))

    def pin_memory(self) -> "Packed":
        return self.each(Tensor.pin_memory)


class Encoder:
    """Text to ids; the special tokens that a batch needs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.image_pad = self._id_of("<|image_pad|>")
        self.video_pad = self._id_of("<|video_pad|>")
        self.vision_start = self._id_of("<|vision_start|>")
        self.vision_end = self._id_of("<|vision_end|>")
        self.end = self._id_of("<|im_end|>")

    def _id_of(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        assert found is not None, f"the tokenizer has no {token}"
        return found

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


# --- one sample as rows ----------------------------------------------------------------------------


@dataclass(slots=True)
class _Row:
    """Tokens of a shared part or of a turn, in order."""

    at: int
    ids: list[int] = field(default_factory=list)
    axes: list[IntArray] = field(default_factory=list)
    num_asked: int = 0  # of a turn: its tokens before the answer
    feature_rows: list[range] = field(default_factory=list)

    def text(self, ids: list[int]) -> None:
        self.ids += ids
        self.axes.append(np.tile(np.arange(self.at, self.at + len(ids)), (3, 1)))
        self.at += len(ids)

    def picture(self, pad: int, grid: Grid) -> None:
        """Placeholders of one picture, or of all pairs of frames of a clip."""
        start, each = len(self.ids), grid.num_tokens // grid.times
        self.ids += [pad] * grid.num_tokens
        self.axes.append(token_positions(grid, self.at))
        self.at = next_position(grid, self.at)
        self.feature_rows += [
            range(start + i * each, start + (i + 1) * each) for i in range(grid.times)
        ]


@dataclass(slots=True)
class _Cut:
    """One picture, or one pair of frames of a video."""

    first: npt.NDArray[np.uint8]
    second: npt.NDArray[np.uint8] | None
    grid: Grid
    marks: list[Mark] | None


@dataclass(slots=True)
class Rows:
    """One sample, ready to be packed: its pictures cut, its texts as tokens."""

    kind: str
    cuts: list[_Cut]
    shared: _Row
    turns: list[_Row]

    @property
    def num_patches(self) -> int:
        return sum(len(cut.first) for cut in self.cuts)

    @property
    def num_pairs(self) -> int:
        return sum(len(cut.second) for cut in self.cuts if cut.second is not None)

    @property
    def num_turn_tokens(self) -> int:
        return sum(len(turn.ids) for turn in self.turns)

    @property
    def num_learnt(self) -> int:
        return sum(len(turn.ids) - turn.num_asked for turn in self.turns)

    @property
    def num_marks(self) -> int:
        return sum(len(mark.labels) for cut in self.cuts for mark in cut.marks or ())


def rows_of(rng: random.Random, encoder: Encoder, sample: Sample) -> Rows:
    """Cut the pictures of a sample and lay out its texts, in one of the ways that people ask."""
    cuts = _cuts(sample)
    question_first = rng.random() < QUESTION_FIRST_SHARE
    turns = [rng.choice(sample.turns)] if question_first else sample.turns
    shared = _Row(0)
    shared.text(encoder(f"{system_turn(rng)}<|im_start|>user\n"))
    if question_first:
        shared.text(encoder(spoken(rng, turns[0][0])))
    grids = [cut.grid for cut in cuts]
    if sample.is_video:
        grids = [Grid(len(grids), grids[0].rows, grids[0].columns)]
    numbered = len(grids) > 1 and rng.random() < NUMBERED_SHARE
    pad = encoder.video_pad if sample.is_video else encoder.image_pad
    for index, grid in enumerate(grids):
        if numbered:
            shared.text(encoder(f"Picture {index + 1}: "))
        shared.text([encoder.vision_start])
        shared.picture(pad, grid)
        shared.text([encoder.vision_end])
    rows = Rows(sample.kind, cuts, shared, [])
    for question, answer in turns:
        turn = _Row(shared.at)
        asked = "" if question_first else spoken(rng, question)
        turn.text(encoder(f"{asked}<|im_end|>\n<|im_start|>assistant\n"))
        turn.num_asked = len(turn.ids)
        turn.text([*encoder(answer), encoder.end])
        rows.turns.append(turn)
    return rows


def _cuts(sample: Sample) -> list[_Cut]:
    cuts = []
    for picture, marks in zip(sample.pictures, sample.marks, strict=True):
        height, width = target_size(picture.height, picture.width, AREA)
        resized = resample(picture, height, width)
        grid = Grid(1, height // PATCH_PX, width // PATCH_PX)
        cuts.append(_Cut(cut_patches(np.asarray(resized)), None, grid, marks))
    if not sample.is_video:
        return cuts
    if len(cuts) % 2:
        cuts.append(cuts[-1])
    return [
        _Cut(first.first, second.first, first.grid, [*(first.marks or ()), *(second.marks or ())])
        for first, second in zip(cuts[::2], cuts[1::2], strict=True)
    ]


# --- many samples as one batch -----------------------------------------------------------------------


def pack(samples: Iterator[Rows], room: Room) -> Packed:
    """Take samples while there is room; the one that has none left is dropped."""
    taken: list[Rows] = []
    left = {
        "patches": room.patches,
        "pairs": room.pairs,
        "runs": room.runs,
        "shared": room.shared - 1,  # filler turns need a sample with a token of its own
        "turns": room.turns,
        "samples": room.samples,
        "asked": room.asked,
        "learnt": room.learnt,
        "marks": room.marks,
    }
    for rows in samples:
        _check_longest(rows, room)
        wanted = {
            "patches": rows.num_patches,
            "pairs": rows.num_pairs,
            "runs": len(rows.cuts),
            "shared": len(rows.shared.ids),
            "turns": rows.num_turn_tokens,
            "samples": 1,
            "asked": len(rows.turns),
            "learnt": rows.num_learnt,
            "marks": rows.num_marks,
        }
        after = {name: left[name] - wanted[name] for name in left}
        num_fillers = _num_fillers(after["shared"] + 1, after["turns"], room)
        # What is left of patches and tokens is cut into runs of filler, which need room as well.
        after_filling = after | {
            "runs": after["runs"] - -(-after["patches"] // room.run),
            "samples": after["samples"] - num_fillers,
            "asked": after["asked"] - -(-after["turns"] // room.turn) - num_fillers,
            "shared": after["shared"] + 1 - num_fillers,
        }
        if min(*after.values(), *after_filling.values()) < 0:
            break
        left = after
        taken.append(rows)
    assert taken, "a sample larger than the room"
    return _assemble(taken, room)


def _check_longest(rows: Rows, room: Room) -> None:
    """The kernels are told these lengths, and read or write elsewhere if one is longer."""
    assert max((len(cut.first) for cut in rows.cuts), default=0) <= room.run
    assert len(rows.shared.ids) <= room.sample
    assert max(len(turn.ids) for turn in rows.turns) <= room.turn
    assert len(rows.turns) <= room.asked_of_one


def _num_fillers(spare: int, spare_turns: int, room: Room) -> int:
    """Samples that own what is left: all filler turns, each with a token of a shared part at least."""
    return max(-(-spare // room.sample), -(-spare_turns // (room.turn * room.asked_of_one)))


def _assemble(taken: list[Rows], room: Room) -> Packed:
    num_tokens, num_features = room.shared + room.turns, room.patches // MERGE**2
    patches = np.zeros((room.patches, PATCH_VALUES), dtype=np.uint8)
    seconds = np.zeros((room.pairs, PATCH_VALUES), dtype=np.uint8)
    second_rows = np.full(room.pairs, room.patches, dtype=np.int64)
    at = np.zeros((room.patches, 2), dtype=np.int16)
    feature_rows = np.full(num_features, num_tokens, dtype=np.int64)
    marked = np.zeros(num_features, dtype=np.uint8)
    ids = np.zeros(num_tokens, dtype=np.int32)
    axes = np.zeros((3, num_tokens), dtype=np.int32)
    learnt_rows = np.zeros(room.learnt, dtype=np.int64)
    learnt_ids = np.full(room.learnt, -100, dtype=np.int64)
    kind = np.zeros(room.learnt, dtype=np.int64)
    answer = np.full(room.learnt, room.asked, dtype=np.int64)
    marks: list[tuple[int, int]] = []
    run_sizes, shared_sizes, turn_sizes, sample_turn_sizes = [], [], [], []
    patch = pair = learnt = asked = 0
    token, turn_token = 0, room.shared
    for rows in taken:
        for cut, places in zip(rows.cuts, rows.shared.feature_rows, strict=True):
            num = len(cut.first)
            patches[patch : patch + num] = cut.first
            at[patch : patch + num] = patch_positions(cut.grid)
            if cut.second is not None:
                seconds[pair : pair + num] = cut.second
                second_rows[pair : pair + num] = np.arange(patch, patch + num)
                pair += num
            first = patch // MERGE**2
            feature_rows[first : first + len(places)] = np.arange(places.start, places.stop) + token
            if cut.marks is not None:
                marked[first : first + len(places)] = 1
                for mark in cut.marks:
                    row, numbers = mark_number(mark, cut.grid)
                    marks += [(first + row, number) for number in numbers]
            run_sizes.append(num)
            patch += num
        num = len(rows.shared.ids)
        ids[token : token + num] = rows.shared.ids
        axes[:, token : token + num] = np.concatenate(rows.shared.axes, axis=1)
        shared_sizes.append(num)
        token += num
        sample_turn_sizes.append(rows.num_turn_tokens)
        for turn in rows.turns:
            num = len(turn.ids)
            ids[turn_token : turn_token + num] = turn.ids
            axes[:, turn_token : turn_token + num] = np.concatenate(turn.axes, axis=1)
            new = num - turn.num_asked
            learnt_rows[learnt : learnt + new] = np.arange(turn.num_asked - 1, num - 1) + turn_token
            learnt_ids[learnt : learnt + new] = turn.ids[turn.num_asked :]
            kind[learnt : learnt + new] = KINDS.index(rows.kind)
            answer[learnt : learnt + new] = asked
            learnt, asked = learnt + new, asked + 1
            turn_sizes.append(num)
            turn_token += num
    _fill(run_sizes, room.patches - patch, room.run, room.runs)
    spare, spare_turns = room.shared - token, num_tokens - turn_token
    longest_of_turns = room.turn * room.asked_of_one
    num_fillers = _num_fillers(spare, spare_turns, room)
    for index in range(num_fillers):
        shared_sizes.append(_nth_share(spare, num_fillers, index))
        mine = _nth_share(spare_turns, num_fillers, index)
        sample_turn_sizes.append(mine)
        turn_sizes += [room.turn] * (mine // room.turn) + [mine % room.turn] * (
            mine % room.turn > 0
        )
    _fill(shared_sizes, 0, room.sample, room.samples)
    _fill(sample_turn_sizes, 0, longest_of_turns, room.samples)
    _fill(turn_sizes, 0, room.turn, room.asked)
    mark_rows = np.full(room.marks, num_features, dtype=np.int64)
    mark_numbers = np.zeros(room.marks, dtype=np.int64)
    mark_rows[: len(marks)] = [row for row, _ in marks]
    mark_numbers[: len(marks)] = [number for _, number in marks]
    tensor = torch.from_numpy
    return Packed(
        patches=tensor(patches),
        seconds=tensor(seconds),
        second_rows=tensor(second_rows),
        at=tensor(at),
        run_starts=_starts(run_sizes),
        ids=tensor(ids),
        axes=tensor(axes),
        feature_rows=tensor(feature_rows),
        part_starts=_starts([*shared_sizes, *turn_sizes]),
        sample_starts=_starts(shared_sizes),
        sample_turn_starts=_starts(sample_turn_sizes),
        learnt_rows=tensor(learnt_rows),
        learnt_ids=tensor(learnt_ids),
        kind=tensor(kind),
        answer=tensor(answer),
        marked=tensor(marked),
        mark_rows=tensor(mark_rows),
        mark_numbers=tensor(mark_numbers),
    )


def _fill(sizes: list[int], num_left: int, longest: int, length: int) -> None:
    """Cut what is left into runs that are not too long, then bring the list to its length."""
    while num_left > 0:
        sizes.append(min(longest, num_left))
        num_left -= sizes[-1]
    assert len(sizes) <= length, f"{len(sizes)} runs where {length} have room"
    sizes += [0] * (length - len(sizes))


def _nth_share(amount: int, num: int, index: int) -> int:
    return amount * (index + 1) // num - amount * index // num


def _starts(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32)


# --- the stream --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What to draw.

    Attributes:
        num_easy: over so many batches the share of easy samples falls from all to none: small
            pictures, short words and clips, from which the hard ones are then soon learnt.
        kinds: only these kinds, one as often as it is named; all, in their shares, when empty.
        names: of the photographs that pieces are cut from.
    """

    num_easy: int = 0
    kinds: tuple[str, ...] = ()
    room: Room = Room()
    names: tuple[str, ...] = photos.TRAINING_PHOTOS

    def share_easy(self, index: int) -> float:
        return max(0.0, 1 - index / max(1, self.num_easy))


def packed_batch(encoder: Encoder, seed: str, plan: Plan, share_easy: float = 0.0) -> Packed:
    """Draw one batch; a pure function of its arguments."""
    return pack(_samples(random.Random(seed), encoder, plan, share_easy), plan.room)


def _samples(rng: random.Random, encoder: Encoder, plan: Plan, share_easy: float) -> Iterator[Rows]:
    while True:
        is_easy = rng.random() < share_easy
        kind = rng.choice(plan.kinds) if plan.kinds else random_kind(rng, is_easy)
        sample = draw_sample(rng, kind, is_easy, plan.names)
        yield rows_of(rng, encoder, sample)


class PackedBatches(IterableDataset[Packed]):
    """An endless stream, the same for the same seed and plan, however many workers draw it."""

    def __init__(self, tokenizer_json: str, seed: str, plan: Plan, start: int) -> None:
        self.tokenizer_json, self.seed, self.plan, self.start = tokenizer_json, seed, plan, start

    def __iter__(self) -> Iterator[Packed]:
        encoder = Encoder(Tokenizer.from_str(self.tokenizer_json))
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        index = self.start + first
        while True:
            yield packed_batch(
                encoder, f"{self.seed}/{index}", self.plan, self.plan.share_easy(index)
            )
            index += step
