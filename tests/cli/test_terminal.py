"""What stands on a terminal and what in a pipe, with a real pseudo-terminal and real processes."""

import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

import pytest

from cli.main import app
from tests.cli.fakes import FakeLLM
from tests.cli.pictures import save_pictures

ROOT = Path(__file__).parents[2]
BAR = re.compile(r"━.* 3/3 .*images/s .*\d:\d\d:\d\d")  # the last is the time left, then taken
CURSOR = re.compile(r"\x1b\[[\d;?]*[A-Za-ln-z]")  # every escape but a colour's, which ends in m
COLOUR = re.compile(r"\x1b\[[\d;]*m")

pytestmark = pytest.mark.usefixtures("folder")


class Terminal:
    """A pseudo-terminal whose screen is read as it is written, so that no writer waits."""

    def __init__(self) -> None:
        self._ours, self._theirs = pty.openpty()
        self.stream = open(os.dup(self._theirs), "w", encoding="utf-8")  # noqa: SIM115, PTH123
        self._bytes = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while piece := os.read(self._ours, 65536):
                self._bytes += piece
        except OSError:
            pass  # Linux says EIO when the last writer has gone

    def close(self) -> str:
        """Hang up, and return all that was written."""
        self.stream.close()
        os.close(self._theirs)
        self._reader.join(timeout=60)
        os.close(self._ours)
        return self._bytes.decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


Run = Callable[..., int]


@pytest.fixture
def run(llm: FakeLLM) -> Run:
    """Run the command on these two streams and return its exit code."""

    def invoke(*args: str, out: TextIO, err: TextIO) -> int:
        with redirect_stdout(out), redirect_stderr(err):
            exit_code: int = app(args, standalone_mode=False)
        return exit_code

    return invoke


def test_terminal_shows_a_bar_and_the_texts_above_it(run: Run, terminal: Terminal) -> None:
    save_pictures(3)

    exit_code = run("caption", "pics", out=terminal.stream, err=terminal.stream)

    screen = COLOUR.sub("", terminal.close())
    lines = CURSOR.sub("", screen).replace("\r", "\n").split("\n")
    assert 0 == exit_code
    assert BAR.search(screen)
    assert [f"pics/{index}.png" for index in range(3)] == [
        line.split(":")[0] for line in lines if line.startswith("pics/")
    ]


def test_bar_is_on_stderr_while_stdout_goes_to_a_file(run: Run, terminal: Terminal) -> None:
    save_pictures(3)

    with Path("out.txt").open("w", encoding="utf-8") as out:
        run("caption", "pics", out=out, err=terminal.stream)

    screen = COLOUR.sub("", terminal.close())
    assert BAR.search(screen)
    assert "pics/" not in screen
    assert 3 == len(Path("out.txt").read_text(encoding="utf-8").splitlines())


def test_errors_stand_above_the_bar(run: Run, terminal: Terminal) -> None:
    save_pictures(3)
    Path("pics/1.png").write_bytes(b"no picture")

    with Path("out.txt").open("w", encoding="utf-8") as out:
        exit_code = run("caption", "pics", out=out, err=terminal.stream)

    screen = COLOUR.sub("", terminal.close())
    assert 1 == exit_code
    assert "error: pics/1.png: Failed to load image" in screen
    assert screen.index("error: pics/1.png") < screen.rindex("3/3")


@pytest.mark.parametrize("force_color", ["", "1"])
def test_pipes_hold_texts_and_no_bar(
    run: Run, monkeypatch: pytest.MonkeyPatch, force_color: str
) -> None:
    monkeypatch.setenv("FORCE_COLOR", force_color)
    save_pictures(3)

    with Path("out.txt").open("w") as out, Path("err.txt").open("w") as err:
        run("caption", "pics", out=out, err=err)

    assert "" == Path("err.txt").read_text()
    assert 3 == len(Path("out.txt").read_text().splitlines())
    assert "\x1b" not in Path("out.txt").read_text()


def test_no_color_is_respected(
    run: Run, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    save_pictures(3)

    run("caption", "pics", out=terminal.stream, err=terminal.stream)

    screen = terminal.close()
    colours = {code for match in COLOUR.findall(screen) for code in re.findall(r"\d+", match)}
    assert BAR.search(COLOUR.sub("", screen))
    assert colours <= {"0", "1", "2"}  # bold and dim are no colours


def test_terminal_without_a_cursor_gets_plain_lines(
    run: Run, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    save_pictures(3)

    run("caption", "pics", out=terminal.stream, err=terminal.stream)

    screen = terminal.close()
    assert "\x1b" not in screen
    assert 3 == screen.count("pics/")


# Real processes


FAKE_COMMAND = """
import time
import cli.local
from cli.main import main
from tests.cli.fakes import FakeLLM

class SlowLLM(FakeLLM):
    def _answer(self, request, text):
        time.sleep(0.1)
        return super()._answer(request, text)

cli.local.load_llm = SlowLLM().load
main()
"""


REAL_COMMAND = "from cli.main import main; main()"


def start(program: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_ends_the_process_with_130_and_one_line() -> None:
    save_pictures(200)

    with start(FAKE_COMMAND, "caption", "pics") as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)

    assert 130 == process.returncode
    assert re.fullmatch(r"stopped: \d+ of 200 images done\.\n", errors)


def test_ctrl_c_leaves_though_a_pipe_is_never_written_to() -> None:
    os.mkfifo("silent.png")
    save_pictures(1)

    with start(REAL_COMMAND, "caption", "pics", "silent.png") as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        time.sleep(2.0)  # or two signals may count as one
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)

    assert 130 == process.returncode
    assert "stopped: 1 of 2 images done.\n" == errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("args", [["caption", "pics"], ["caption", "pics", "--json"], ["--help"]])
def test_full_disk_is_one_line(args: list[str]) -> None:
    save_pictures(3)

    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [sys.executable, "-c", REAL_COMMAND if "--help" in args else FAKE_COMMAND, *args],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )

    assert 1 == run.returncode
    assert "error: The output cannot be written: No space left on device.\n" == run.stderr


@pytest.mark.parametrize(("closed", "num_lines"), [("<&- >&- 2>&-", 0), (">&-", 0), ("2>&-", 3)])
def test_streams_that_are_closed_cost_nothing_else(closed: str, num_lines: int) -> None:
    save_pictures(3)

    run = subprocess.run(
        ["/bin/sh", "-c", f'"$0" -c "$1" caption pics {closed}', sys.executable, FAKE_COMMAND],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (0, "") == (run.returncode, run.stderr)
    assert num_lines == len(run.stdout.splitlines())


def test_reader_that_goes_away_ends_the_process_without_a_trace() -> None:
    save_pictures(200)

    with start(FAKE_COMMAND, "caption", "pics") as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(timeout=120)

    assert (1, "") == (process.returncode, errors)


@pytest.mark.parametrize(
    "args", [["--help"], ["serve", "--help"], ["--version"], ["version"], ["models"]]
)
def test_help_version_and_models_load_neither_torch_nor_transformers(args: list[str]) -> None:
    program = (
        "import sys\n"
        "from cli.main import app\n"
        "assert not app(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'transformers'}.intersection(sys.modules)\n"
    )

    with start(program, *args) as process:
        output, errors = process.communicate(timeout=120)

    assert (0, "") == (process.returncode, errors)
    assert ("qwen2_vl" if args == ["models"] else "darkroom") in output
