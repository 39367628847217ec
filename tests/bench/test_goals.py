import json
import sys
from pathlib import Path

import pytest

from bench.goals import GOALS, Goal, compare, main, measure

SAYS = """
import sys
print('{"run": 0, "prompts_s": 2.0}')
print('{"run": 1, "prompts_s": 3.0, "ready_s": 1.5}')
print('{"summary": "caption", "ratio": 4.5}')
print(sys.argv[1:], file=sys.stderr)
"""


def engine(program: str) -> tuple[str, ...]:
    return sys.executable, "-c", program


def test_fastest_run_counts_and_all_that_was_said_is_kept(tmp_path: Path) -> None:
    goal = Goal("--work caption --profile busy.json", least=4)

    line = measure("caption", goal, tmp_path, timeout_s=60, engine=engine(SAYS))

    assert 3.0 == line["figure"] == line["prompts_s"]
    assert 1.5 == line["ready_s"]
    assert "ended" not in line
    assert 3 == len((tmp_path / "caption.jsonl").read_text().splitlines())
    words = ["--work", "caption", "--profile", str(tmp_path / "busy.json")]
    assert f"{words}\n" == (tmp_path / "caption.log").read_text()
    ratio = measure("generate", Goal("", "ratio"), tmp_path, timeout_s=60, engine=engine(SAYS))
    assert 4.5 == ratio["figure"]


def test_figure_that_is_null_is_none(tmp_path: Path) -> None:
    program = 'print(\'{"profile": "busy.json", "steady_busy_share": null}\')'
    goal = Goal("", "steady_busy_share")

    line = measure("busy", goal, tmp_path, timeout_s=60, engine=engine(program))

    assert line["figure"] is None
    assert "ended" not in line


@pytest.mark.parametrize(
    ("program", "timeout_s", "ended"),
    [("raise SystemExit('no device')", 60, 1), ("import time; time.sleep(60)", 0.3, "after 0.3 s")],
)
def test_one_that_fails_or_hangs_says_how_it_ended(
    tmp_path: Path, program: str, timeout_s: float, ended: int | str
) -> None:
    line = measure("caption", Goal(""), tmp_path, timeout_s=timeout_s, engine=engine(program))

    assert line["figure"] is None
    assert ended == line["ended"]
    assert ("no device" in line["log"]) == (ended == 1)


def test_a_figure_is_compared_with_its_goal_or_with_another_figure() -> None:
    found = {"even": 200.0, "tail": 180.0}

    assert {"counts": 65.0, "goal": 130, "reached": 0.5} == compare(GOALS["caption"], 65.0, found)
    assert {"counts": 0.9, "goal": 0.85, "reached": 1.059} == compare(GOALS["tail"], 180.0, found)
    assert {} == compare(GOALS["tail"], 180.0, {"tail": 180.0})
    assert {} == compare(GOALS["even"], 200.0, found)


def test_some_are_measured_in_the_order_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def say(name: str, *_: object, **__: object) -> dict[str, object]:
        asked.append(name)
        return {"name": name, "figure": 10.0 * len(asked)}

    monkeypatch.setattr("bench.goals.measure", say)
    monkeypatch.setattr(sys, "argv", ["goals", "--out", str(tmp_path), "--only", "even", "tail"])

    main()

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["even", "tail"] == asked == [line["name"] for line in lines]
    assert 2.0 == lines[1]["counts"]
