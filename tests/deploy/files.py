"""Dockerfile and compose.yaml as values, read by as much of their grammar as ours use."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]


@dataclass(slots=True)
class Stage:
    """
    One FROM and what follows it.

    Args:
        base: the image or the earlier stage that it is built on.
        steps: instruction and arguments, in order; ENV and the like included.
    """

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def values(self, instruction: str) -> list[str]:
        return [words for name, words in self.steps if name == instruction]


def read_dockerfile() -> dict[str, Stage]:
    """The stages by name, in order."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    stages: dict[str, Stage] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        instruction, _, words = line.strip().partition(" ")
        if instruction == "FROM":
            found = re.fullmatch(r"(\S+) AS (\S+)", words)
            assert found, f"a stage without a name: {line}"
            stage = stages[found[2]] = Stage(found[2], found[1])
        elif stages and instruction:
            stage.steps.append((instruction, words.strip()))
    return stages


def collect(stages: dict[str, Stage], target: str, instruction: str) -> list[str]:
    """The arguments of an instruction in a target and all that it is built on, the base first."""
    stage = stages[target]
    inherited = collect(stages, stage.base, instruction) if stage.base in stages else []
    return inherited + stage.values(instruction)


def last_json(stages: dict[str, Stage], target: str, instruction: str) -> list[str]:
    found: list[str] = json.loads(collect(stages, target, instruction)[-1])
    return found


def read_env(stages: dict[str, Stage], target: str) -> dict[str, str]:
    pairs = " ".join(collect(stages, target, "ENV"))
    return dict(re.findall(r"(\w+)=(\S+)", pairs))


def read_compose() -> dict[str, Any]:
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    compose: dict[str, Any] = yaml.safe_load(text)
    return compose


def fill_in(text: str) -> str:
    """`${NAME:-value}` as compose reads it where nothing is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def read_seconds(duration: str) -> float:
    found = re.fullmatch(r"([0-9]+)s", duration)
    assert found, f"not in seconds: {duration}"
    return float(found[1])
