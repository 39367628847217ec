"""Workers of a model have the same limits, and lines are checked with them."""

import threading

import pytest

from storage import served
from storage.db import Database
from storage.errors import ServedOtherwiseError
from storage.served import Reported, Served

ALIVE_S = 60.0
FOUR, TWO = Served("M", 4, 1), Served("M", 2, 1)


def register(database: Database, word: Served, *, worker: str, alive_s: float = 60.0) -> None:
    with database.write() as session:
        served.register(session, word, worker=worker, alive_s=alive_s)


def find(database: Database) -> Served | None:
    with database.read() as session:
        return served.find(session, "M")


def leave(database: Database, worker: str) -> None:
    with database.write() as session:
        served.leave(session, "M", worker=worker)


def test_limits_are_those_of_the_workers_and_outlive_them(database: Database) -> None:
    assert find(database) is None
    register(database, FOUR, worker="a")
    register(database, FOUR, worker="b")
    leave(database, "b")

    assert FOUR == find(database)
    with database.read() as session:
        assert served.find(session, "another") is None


def test_worker_with_other_limits_waits_until_the_others_are_gone(database: Database) -> None:
    register(database, FOUR, worker="a")
    with pytest.raises(ServedOtherwiseError, match=r"image=4.*image=2"):
        register(database, TWO, worker="b")
    leave(database, "b")  # which never came
    with pytest.raises(ServedOtherwiseError):
        register(database, TWO, worker="b")

    leave(database, "a")
    register(database, TWO, worker="b")
    assert TWO == find(database)


def test_one_of_two_that_leaves_is_no_end_while_the_other_one_beats(database: Database) -> None:
    for worker in ("a", "b"):
        register(database, FOUR, worker=worker)
    leave(database, "b")
    with database.write() as session:
        served.touch(session, "M", worker="a")

    with pytest.raises(ServedOtherwiseError):
        register(database, TWO, worker="c")


def test_worker_that_was_killed_is_gone_after_a_while(database: Database) -> None:
    register(database, FOUR, worker="a")
    register(database, TWO, worker="b", alive_s=-1.0)

    assert TWO == find(database)


def test_frames_are_a_limit_like_the_others(database: Database) -> None:
    sixty = Served("M", 4, 1, 60)
    register(database, sixty, worker="a")

    assert sixty == find(database)
    with pytest.raises(ServedOtherwiseError, match=r"image=4, video=1, frames=60, and .* video=1:"):
        register(database, FOUR, worker="b")


def report(
    database: Database, worker: str, tokens: int, *, model: str = "M", alive_s: float = ALIVE_S
) -> int | None:
    usage = {"num_tokens": tokens, "floor_s": None}
    with database.write() as session:
        return served.report(session, model, worker=worker, usage=usage, alive_s=alive_s)


def list_reports(database: Database) -> list[tuple[str, int, int]]:
    with database.read() as session:
        reports: list[Reported] = served.list_reports(session)
    return [(each.model, each.number, each.usage["num_tokens"]) for each in reports]


def test_each_worker_keeps_its_number_and_what_it_said_last_stands(database: Database) -> None:
    numbers = [report(database, "a", 1), report(database, "b", 2)]
    numbers += [report(database, "c", 3, model="another")]
    later = [report(database, "b", 20), report(database, "a", 10)]

    assert [0, 1, 0] == numbers
    assert [None, None] == later
    assert [("M", 0, 10), ("M", 1, 20), ("another", 0, 3)] == list_reports(database)


def test_number_of_one_that_has_left_goes_to_the_next_one(database: Database) -> None:
    for worker in ("a", "b"):
        report(database, worker, 1)
    leave(database, "a")
    left = list_reports(database)

    assert [("M", 1, 1)] == left
    assert 0 == report(database, "c", 5)
    assert [("M", 0, 5), ("M", 1, 1)] == list_reports(database)


def test_number_of_one_that_was_killed_is_free_after_a_while(database: Database) -> None:
    report(database, "a", 1, alive_s=-1.0)
    report(database, "a", 2, alive_s=-1.0)  # it was late, and nobody has taken its number
    gone = list_reports(database)
    number = report(database, "b", 7)

    assert [] == gone
    assert 0 == number
    assert 1 == report(database, "a", 3)  # it was not killed after all
    assert [("M", 0, 7), ("M", 1, 3)] == list_reports(database)


def test_workers_that_come_at_once_get_numbers_of_their_own(database: Database) -> None:
    def come(worker: str) -> None:
        for tokens in range(8):
            report(database, worker, tokens)

    threads = [threading.Thread(target=come, args=(f"w{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [("M", number, 7) for number in range(8)] == list_reports(database)
