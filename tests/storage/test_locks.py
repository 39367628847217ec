"""Advisory locks: one holder at a time, and none that outlives its process."""

import subprocess
import sys
from pathlib import Path

from storage.db import Database
from storage.locks import hold
from tests.waiting import wait_until

HOLDER = (
    "import sys, time; from storage.db import Database; from storage.locks import hold\n"
    "with hold(Database(sys.argv[1]), 'sweep') as is_ours:\n"
    "    print(is_ours, flush=True); time.sleep(60)"
)


def test_second_asker_is_told_that_it_is_not_the_holder(database: Database) -> None:
    with hold(database, "sweep") as first, hold(database, "sweep") as second:
        assert (True, False) == (first, second)
        with hold(database, "other") as other:
            assert other

    with hold(database, "sweep") as again:
        assert again


def test_lock_ends_with_its_process(database: Database, database_url: str) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, database_url],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert holder.stdout is not None
    assert "True" == holder.stdout.readline().strip()
    with hold(database, "sweep") as while_it_lives:
        pass
    holder.kill()
    holder.communicate()

    assert not while_it_lives

    def is_free() -> bool:
        with hold(database, "sweep") as is_ours:
            return is_ours

    wait_until(is_free)  # the server notices a moment later
