"""Our own broker: started, shared, adopted and stopped. And sends that must not wait."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.ids import JobId, new_uuid
from tasks.app import CPU_QUEUE, name_gpu_queue
from tasks.broker import build_client, open_broker, ping, refuse_unsafe_broker
from tasks.config import load_config
from tasks.dispatch import Dispatcher
from tasks.errors import BrokerUnavailableError, UnsafeSettingError

NOBODY = "redis://127.0.0.1:1/0"


def test_own_broker_starts_on_loopback_and_ends_with_the_block(tmp_path: Path) -> None:
    with open_broker(load_config(home=tmp_path)) as url:
        ping(url)
        refuse_unsafe_broker(url)
        with build_client(url) as client:
            assert "yes" == client.config_get("appendonly")["appendonly"]
        with open_broker(load_config(home=tmp_path)) as second:
            assert url == second
        ping(url)

    with pytest.raises(BrokerUnavailableError):
        ping(url)


def test_broker_of_a_killed_owner_is_adopted_and_stopped(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib; from tasks.broker import open_broker\n"
        "from tasks.config import load_config\n"
        "with open_broker(load_config(home=pathlib.Path(sys.argv[1]))) as url:\n"
        "    print(url, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert owner.stdout is not None
    while not owner.stdout.readline().startswith("redis:"):
        assert owner.poll() is None  # the lines before it are the log
    owner.kill()
    owner.communicate()
    note = json.loads((tmp_path / "valkey" / "darkroom.json").read_text())
    with open_broker(load_config(home=tmp_path)) as url:
        assert note["url"] == url

    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        try:
            os.kill(note["pid"], signal.SIG_DFL)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the adopted broker still runs")


def test_broker_that_answers_at_our_old_address_is_not_ours(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    with open_broker(load_config(home=there)) as other:
        (here / "valkey").mkdir(parents=True)
        left_behind = (there / "valkey" / "darkroom.json").read_text()
        (here / "valkey" / "darkroom.json").write_text(left_behind)

        with open_broker(load_config(home=here)) as url:
            assert other != url
        ping(other)


def test_broker_that_forgets_is_refused(tmp_path: Path) -> None:
    with open_broker(load_config(home=tmp_path)) as url:
        with build_client(url) as client:
            client.config_set("maxmemory-policy", "allkeys-lru")

        with pytest.raises(UnsafeSettingError, match="noeviction"):
            refuse_unsafe_broker(url)


def test_given_broker_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    with (
        pytest.raises(BrokerUnavailableError),
        open_broker(load_config(home=tmp_path, redis_url=NOBODY, start_wait_s=0.1)),
    ):
        pass


def test_sends_reach_their_queues_by_name(tmp_path: Path) -> None:
    config = load_config(home=tmp_path, chunk_items=10)
    with open_broker(config) as url:
        dispatcher = Dispatcher(config, url)
        with build_client(url) as client:
            client.flushall()

            assert dispatcher.send_expand(JobId(new_uuid()))
            assert 3 == dispatcher.send_permits_for("org/model", 21)

            assert 1 == client.llen(CPU_QUEUE)
            assert 3 == client.llen(name_gpu_queue("org/model"))
            assert 3 == dispatcher.count_queued("org/model")
            assert dispatcher.take_permit("org/model")
            assert 2 == dispatcher.count_queued("org/model")
            assert not dispatcher.take_permit("other/model")
            client.flushall()  # a broker that forgot everything still takes and keeps what is sent
            assert 1 == dispatcher.send_permits("org/model", 1)
            assert 1 == client.llen(name_gpu_queue("org/model"))
        dispatcher.close()


def test_send_without_a_broker_fails_soon_and_in_silence() -> None:
    dispatcher = Dispatcher(load_config(), NOBODY)
    started = time.monotonic()

    assert not dispatcher.send_expand(JobId(new_uuid()))
    assert 0 == dispatcher.send_permits("m", 5)
    assert dispatcher.count_queued("m") is None

    assert time.monotonic() - started < 30.0
    dispatcher.close()


def test_own_broker_is_out_of_reach_of_the_terminal(tmp_path: Path) -> None:
    home = tmp_path / "with space"
    with open_broker(load_config(home=home)) as url:
        pid = json.loads((home / "valkey" / "darkroom.json").read_text())["pid"]

        ping(url)
        assert pid == os.getsid(pid)  # a signal to our own process group does not arrive there
        assert os.getsid(0) != os.getsid(pid)
