"""The table that a decode step reads, and what the device keeps between steps."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from engine.kernels import draw
from engine.runner import Runner
from engine.slots import LEN, POSITION, SLOT, START, WRITE_ROW, Slots


@dataclass(slots=True, eq=False)
class Numbers:
    """What the table reads of a sequence."""

    slot: int
    start: int
    num_prompt_tokens: int
    num_launched: int = 1
    prepared: Any = field(default_factory=lambda: SimpleNamespace(rope_delta=-3))
    draw_numbers: draw.Numbers = draw.GREEDY

    @property
    def num_rows(self) -> int:
        return self.num_prompt_tokens + self.num_launched


def test_newest_token_has_the_last_row_and_nobody_has_scratch() -> None:
    slots = Slots(8, torch.device("cpu"))
    table = slots.table([Numbers(5, 160, 10), Numbers(0, 16, 20, 4)], 4)

    assert [5, 0, 8, 8] == table[SLOT].tolist()
    assert [160, 16, 0, 0] == table[START].tolist()
    assert [11, 24, 1, 1] == table[LEN].tolist()
    assert [170, 39, 0, 0] == table[WRITE_ROW].tolist()
    assert [7, 20, 0, 0] == table[POSITION].tolist()


def test_table_of_the_same_batch_goes_on_as_a_new_one_would() -> None:
    slots = Slots(8, torch.device("cpu"))
    runner: Any = SimpleNamespace(_slots=slots, _last_table=([], None, 0))
    batch = [Numbers(1, 160, 10), Numbers(0, 16, 20, 4)]
    steps = [batch, batch, batch[:1], batch, batch, batch]
    for number, sequences in enumerate(steps):
        table = Runner._next_table(runner, sequences, 4)  # type: ignore[arg-type]

        assert slots.table(sequences, 4).tolist() == table.tolist()
        if number != 3:  # a step that failed counts no token, and is asked for again
            for sequence in sequences:
                sequence.num_launched += 1


def test_table_of_draws_goes_on_too_and_is_made_anew_where_tokens_were_not_drawn() -> None:
    slots = Slots(8, torch.device("cpu"))
    runner: Any = SimpleNamespace(_slots=slots, _last_table=([], None, 0))
    batch = [Numbers(1, 160, 10, draw_numbers=(7, 0, 1, 2, 3, 4)), Numbers(0, 16, 20, 4)]
    for draws in (False, True, True, True, False, True, True):
        table = Runner._next_table(runner, batch, 4, draws=draws)  # type: ignore[arg-type]

        expected = slots.table(batch, 4).tolist()
        if draws:
            positions = [sequence.num_launched for sequence in batch]
            numbers = [sequence.draw_numbers for sequence in batch]
            expected += draw.table(numbers, positions, 4).tolist()
        assert expected == table.tolist()
        for sequence in batch:
            sequence.num_launched += 1


def test_no_token_is_kept_as_one_that_can_be_read() -> None:
    slots = Slots(3, torch.device("cpu"))
    slots.keep(torch.tensor([2, 0]), torch.tensor([7, -1]))

    assert [0, 0, 7, 0] == slots.tokens.tolist()
