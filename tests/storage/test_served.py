"""Workers of a model have the same limits, and lines are checked with them."""

import pytest

from storage import served
from storage.db import Database
from storage.errors import ServedOtherwiseError
from storage.served import Served

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
