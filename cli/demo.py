"""
`darkroom demo`: the samples through the bundled model, the drawn ones checked to the letter.

They go through a whole service that is started for them, as jobs do. Where the service is not
installed, or with --offline, the engine answers in this very process.
"""

import json
import os
import shutil
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.text import Text

from cli.answers import Answer, InOrder, Problem
from cli.client import Client, ServerError, UnreachableError
from cli.errors import CannotStartError, ExitCode
from cli.inputs import Input
from cli.lines import build_clip, build_line, build_picture, encode
from cli.local import EngineOptions, run
from cli.own import OwnService, find_missing, find_port, own_service
from cli.questions import (
    CLIP_PROMPT,
    NUM_FRAMES,
    PICTURE_PROMPT,
    Question,
    ask_about_clip,
    ask_about_picture,
)
from cli.show import Screen
from engine.config import BUNDLED_MODEL
from engine.request import FinishReason, SamplingParams

FOLDER = Path(__file__).parents[1] / "samples"
EXPECTED_NAME = "expected.json"
PHOTO = "photo"  # in expected.json: no sentence about it is the only true one
CLIP_SUFFIX = ".mp4"
MAX_TOKENS = 128
PORT = 8000
MARKS = {"right": "green", "WRONG": "bold red", PHOTO: "cyan"}

NEXT_STEPS = """
Your own pictures:  darkroom caption FOLDER
As a service:       darkroom up, and in another terminal: darkroom submit FOLDER --wait
From Python:        from engine import LLM; llm = LLM(model="darkroom-tiny")
A real model:       darkroom caption FOLDER --model CHECKPOINT; README.md says more"""


def run_demo(device: str, *, must_be_right: bool = False, is_offline: bool = False) -> ExitCode:
    """
    Show what the model says about each sample, and how often it is right.

    Args:
        must_be_right: a wrong sentence about a drawn sample counts as a failure.
        is_offline: with the engine alone, in this process.
    """
    try:
        expected = json.loads((FOLDER / EXPECTED_NAME).read_text(encoding="utf-8"))
    except OSError:
        Screen("samples").complain("The samples are not installed here.")
        return ExitCode.USAGE
    screen = DemoScreen(expected)
    missing = find_missing()
    if missing is not None and not is_offline:
        screen.note(f"The service is not installed here ({missing} is missing): without it, then.")
    if is_offline or missing is not None:
        exit_code = run_offline(list(expected), screen, device)
    else:
        exit_code = run_through_service(list(expected), screen, device)
    is_wrong = must_be_right and screen.num_right < screen.num_drawn
    return ExitCode.SOME_FAILED if is_wrong and exit_code is ExitCode.DONE else exit_code


# In this process


def run_offline(names: Sequence[str], screen: "DemoScreen", device: str) -> ExitCode:
    total = len(names)
    exit_code = run(
        [Input(str(FOLDER / name)) for name in names],
        _ask,
        screen,
        options=EngineOptions(device=device),
        params=SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS),
        limits={"image": 1, "video": 1},
    )
    if screen.num_done == total:
        rate = total / screen.took_s if screen.took_s else 0.0
        screen.print_result(f"{rate:.1f} images/s")
        screen.print(Text(NEXT_STEPS))
    return exit_code


def _ask(sample: Input) -> Question:
    return (
        ask_about_clip(sample) if sample.path.endswith(CLIP_SUFFIX) else ask_about_picture(sample)
    )


# Through a service


def run_through_service(names: Sequence[str], screen: "DemoScreen", device: str) -> ExitCode:
    """Start one, hand the samples in over REST, poll, show what comes, stop it again."""
    total = len(names)
    try:
        with ExitStack() as open_things:
            with screen.waiting("Starting a service"):
                service = open_things.enter_context(
                    own_service(_make_home(), find_port(PORT), ["--device", device])
                )
            with screen.progress(total):
                ask_service(service, names, screen)
    except KeyboardInterrupt:
        screen.stopped(total)
        return ExitCode.INTERRUPTED
    except CannotStartError as error:
        screen.complain(str(error))
        return ExitCode.USAGE
    if screen.num_done < total:
        return ExitCode.SOME_FAILED
    screen.print_result("loading the model included")
    screen.print_places(service)
    screen.print(Text(NEXT_STEPS))
    return ExitCode.SOME_FAILED if screen.num_failed else ExitCode.DONE


def _make_home() -> Path:
    """DARKROOM_HOME where one is named; else a new folder, which stays for who wants to look."""
    home = os.environ.get("DARKROOM_HOME")
    if not home:
        return Path(tempfile.mkdtemp(prefix="darkroom-demo-"))
    path = Path(home).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def ask_service(service: OwnService, names: Sequence[str], screen: "DemoScreen") -> None:
    """
    Submit the samples and show each answer when all before it are there.

    Raises:
        CannotStartError: the service cannot run them; the text says why.
    """
    client = Client(service.url)
    try:
        _follow(client, _submit(client, names), names, screen)
    except (UnreachableError, ServerError) as error:
        text = service.read_reason() if service.has_ended() else str(error)
        raise CannotStartError(text) from error


def _submit(client: Client, names: Sequence[str]) -> str:
    with tempfile.TemporaryFile() as file:
        file.writelines(map(_build_line, names))
        num_bytes = file.tell()
        file.seek(0)
        uploaded = client.upload(file, num_bytes, "samples.jsonl")
    batch = client.submit(uploaded["id"], completion_window="24h")
    return str(batch["id"])


def _build_line(name: str) -> bytes:
    path = FOLDER / name
    media, prompt = (
        (build_clip(encode(path), NUM_FRAMES), CLIP_PROMPT)
        if name.endswith(CLIP_SUFFIX)
        else (build_picture(encode(path)), PICTURE_PROMPT)
    )
    return build_line(name, BUNDLED_MODEL, media, prompt, temperature=0, max_tokens=MAX_TOKENS)


def _follow(client: Client, batch: str, names: Sequence[str], screen: "DemoScreen") -> None:
    held, last_seq = InOrder(), 0
    polled = client.poll(batch)
    while True:
        for piece in client.read_results(batch, after=last_seq):
            for result in map(json.loads, piece.splitlines()):
                last_seq = result["seq"]
                answer = _read_answer(result)
                held.put(result["line"] - 1, answer)
                screen.count(answer)
        for ready in held.take_ready():
            screen.show(ready)
        if polled.has_ended:
            break
        polled = client.poll(batch, after=polled)
    for ready in held.take_rest():
        screen.show(ready)
    for error in (polled.batch["errors"] or {"data": []})["data"]:
        screen.complain(error["message"])


def _read_answer(result: dict[str, Any]) -> Answer:
    path, body = str(FOLDER / result["custom_id"]), result["response"]["body"]
    if "error" in body:
        error = body["error"]
        return Answer(path, error=Problem(error["code"], error["message"], retryable=False))
    choice = body["choices"][0]
    return Answer(
        path, text=choice["message"]["content"], finish_reason=FinishReason(choice["finish_reason"])
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

    def print_result(self, how: str) -> None:
        self.print(
            Text(
                f"\n{self.num_right} of {self.num_drawn} drawn samples are right; "
                f"{self.num_done} samples in {self.took_s:.1f} s, {how}."
            )
        )

    def print_places(self, service: OwnService) -> None:
        """Where a newcomer may look at what has become of the samples."""
        self.print(
            Text(
                "They went through a whole service: in over REST, queued, worked off, and kept.\n\n"
                f"Database:           {service.home / 'darkroom.sqlite3'}\n"
                f"Files:              {service.home / 'blobs'}\n"
                f"Log:                {service.log}\n"
                f"Look at it again:   DARKROOM_HOME={service.home} darkroom up"
            )
        )
