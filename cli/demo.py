"""
`darkroom demo`: the samples through the bundled model, the drawn ones checked to the letter.
"""

import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.text import Text

from cli.answers import Answer
from cli.errors import ExitCode
from cli.inputs import Input
from cli.local import EngineOptions, run
from cli.questions import Question, ask_about_clip, ask_about_picture
from cli.show import Screen
from engine.request import SamplingParams

FOLDER = Path(__file__).parents[1] / "samples"
EXPECTED_NAME = "expected.json"
PHOTO = "photo"  # in expected.json: no sentence about it is the only true one
CLIP_SUFFIX = ".mp4"
PARAMS = SamplingParams(temperature=0.0, max_tokens=128)
MARKS = {"right": "green", "WRONG": "bold red", PHOTO: "cyan"}

NEXT_STEPS = """
Your own pictures:  darkroom caption FOLDER
From Python:        from engine import LLM; llm = LLM(model="darkroom-tiny")
A real model:       darkroom caption FOLDER --model CHECKPOINT; README.md says more"""


def run_demo(device: str, *, must_be_right: bool = False) -> ExitCode:
    """
    Show what the model says about each sample, and how often it is right.

    Args:
        must_be_right: a wrong sentence about a drawn sample counts as a failure.
    """
    try:
        expected = json.loads((FOLDER / EXPECTED_NAME).read_text(encoding="utf-8"))
    except OSError:
        Screen("samples").complain("The samples are not installed here.")
        return ExitCode.USAGE
    screen = DemoScreen(expected)
    exit_code = run(
        [Input(str(FOLDER / name)) for name in expected],
        _ask,
        screen,
        options=EngineOptions(device=device),
        params=PARAMS,
        limits={"image": 1, "video": 1},
    )
    if screen.num_done < len(expected):
        return exit_code
    screen.print_result()
    is_wrong = must_be_right and screen.num_right < screen.num_drawn
    return ExitCode.SOME_FAILED if is_wrong else exit_code


def _ask(sample: Input) -> Question:
    return (
        ask_about_clip(sample) if sample.path.endswith(CLIP_SUFFIX) else ask_about_picture(sample)
    )


class DemoScreen(Screen):
    """
    A mark before each text: right or WRONG where a sample was drawn, else what it is.

    Args:
        expected: file name -> the true sentence, or PHOTO.
    """

    def __init__(self, expected: Mapping[str, str]) -> None:
        super().__init__("samples")
        self.num_right = 0
        self.num_drawn = sum(sentence != PHOTO for sentence in expected.values())
        self._expected = expected
        self._name_width = max(map(len, expected))

    def show_text(self, answer: Answer) -> None:
        name = Path(answer.path).name
        _, text = answer.to_line()
        sentence = self._expected[name]
        mark = PHOTO if sentence == PHOTO else "right" if text == sentence else "WRONG"
        self.num_right += mark == "right"
        for line in self._lay_out(mark, name, text):
            self.print(line)
        if mark == "WRONG":
            for line in self._lay_out("", "  expected", sentence):
                self.print(line)

    def _lay_out(self, mark: str, name: str, text: str) -> Iterator[Text]:
        """Yield the lines of one sample, the text in a column of its own."""
        head = f"{mark:5}  {name:{self._name_width}}  "
        width = max(len(head) + 20, shutil.get_terminal_size().columns)
        first, *rest = textwrap.wrap(head + text, width, subsequent_indent=" " * len(head)) or [
            head
        ]
        yield Text.assemble((first[:5], MARKS.get(mark, "")), first[5:])
        yield from map(Text, rest)

    def print_result(self) -> None:
        rate = self.num_done / self.took_s if self.took_s else 0.0
        self.print(
            Text(
                f"\n{self.num_right} of {self.num_drawn} drawn samples are right; "
                f"{self.num_done} samples in {self.took_s:.1f} s, {rate:.1f} images/s."
            )
        )
        self.print(Text(NEXT_STEPS))
