"""Bytes are taken in turn, never beyond the budget, and all come back."""

import threading
from collections.abc import Callable

from storage.ids import ItemId
from tasks.budget import Budget, Hold


def start(act: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_what_does_not_fit_waits_until_there_is_room() -> None:
    budget = Budget(100)
    hold, other = Hold(budget), Hold(budget)
    assert hold.take(ItemId(1), 60, wait=False)
    assert not other.take(ItemId(2), 60, wait=False)

    thread = start(lambda: other.take(ItemId(2), 60, wait=True))
    hold.shrink(ItemId(1), 50)
    thread.join(0.05)
    assert thread.is_alive()
    hold.shrink(ItemId(1), 40)
    thread.join()

    assert 100 == budget.num_bytes
    hold.release(ItemId(1))
    hold.release(ItemId(1))
    other.close()
    assert 0 == budget.num_bytes


def test_item_above_the_budget_has_its_turn_alone_and_is_not_passed() -> None:
    budget = Budget(100)
    hold = Hold(budget)
    hold.take(ItemId(1), 10, wait=True)
    thread = start(lambda: hold.take(ItemId(2), 500, wait=True))
    while hold.take(ItemId(3), 1, wait=False):  # until it waits
        hold.release(ItemId(3))

    hold.release(ItemId(1))
    thread.join()

    assert 500 == budget.num_bytes
    assert not hold.take(ItemId(3), 1, wait=False)


def test_chunk_that_is_over_waits_for_nothing_and_keeps_nothing() -> None:
    budget = Budget(100)
    hold, other = Hold(budget), Hold(budget)
    other.take(ItemId(1), 100, wait=True)
    taken: list[bool] = []
    thread = start(lambda: taken.append(hold.take(ItemId(2), 1, wait=True)))
    hold.close()
    thread.join()
    other.close()
    assert not other.take(ItemId(3), 1, wait=True)
    other.shrink(ItemId(3), 1)

    assert [False] == taken
    assert 0 == budget.num_bytes
