"""Bytes are taken in turn, never beyond the budget, and all come back."""

import time
from collections.abc import Callable
from threading import Thread

from storage.ids import ItemId
from tasks.budget import Budget, Hold


def start(act: Callable[[], object]) -> Thread:
    thread = Thread(target=act)
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
    hold.shrink(ItemId(1), 28)
    thread.join()

    assert 88 == budget.num_bytes
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


def wait_in_line(hold: Hold, item: int, num_bytes: int, *, is_fast: bool = False) -> Thread:
    def count_waiting() -> int:
        return sum(map(len, hold._budget._waiting.values()))

    num_before = count_waiting()
    thread = start(lambda: hold.take(ItemId(item), num_bytes, wait=True, is_fast=is_fast))
    while count_waiting() == num_before:
        assert thread.is_alive()
        time.sleep(0.001)
    return thread


def test_small_ones_pass_a_large_one_that_waits_for_another() -> None:
    budget = Budget(100, large_bytes=40)
    hold = Hold(budget)
    assert hold.take(ItemId(1), 45, wait=False)

    large = wait_in_line(hold, 2, 40)
    assert hold.take(ItemId(3), 30, wait=False)

    hold.release(ItemId(1))
    large.join()
    assert 70 == budget.num_bytes


def test_large_one_is_not_passed_for_ever() -> None:
    budget = Budget(100, large_bytes=40)
    hold = Hold(budget)
    for number in (1, 2):
        assert hold.take(ItemId(number), 30, wait=False)

    large = wait_in_line(hold, 3, 50)
    assert not hold.take(ItemId(4), 5, wait=False)

    hold.release(ItemId(1))
    large.join()
    assert hold.take(ItemId(4), 5, wait=False)


def test_fast_lane_has_bytes_of_its_own_and_goes_first() -> None:
    budget = Budget(100)
    hold = Hold(budget)
    assert hold.take(ItemId(1), 50, wait=False)
    assert hold.take(ItemId(2), 38, wait=False)
    assert not hold.take(ItemId(3), 1, wait=False)
    assert hold.take(ItemId(3), 12, wait=False, is_fast=True)

    bulk = wait_in_line(hold, 4, 38)
    chat = wait_in_line(hold, 5, 30, is_fast=True)
    hold.release(ItemId(2))
    chat.join()
    bulk.join(0.1)
    assert bulk.is_alive()

    hold.release(ItemId(1))
    bulk.join()
    assert 80 == budget.num_bytes
