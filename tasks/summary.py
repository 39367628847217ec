"""
The second pass over an item's parts: from their texts to one, in as many rounds as the model needs.

Pure functions of texts and numbers. The rules, which docs/producers.md gives to users:

- All texts go into one prompt where they fit. The answer's room is left free: `max_tokens`, or a quarter of
  the context where none is given, and never more than half of it.
- Where they do not fit, neighbours are put together as far as they do, each group becomes one text, and
  those are the texts of the next round.
- A text that is longer than half of the room is cut at its end, so that two always fit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

ANSWER_SHARE: Final = 4
"""The context's part that is left for an answer of no given length: one in so many."""

LEAST_ROOM: Final = 64
"""Tokens for the texts of a prompt, whatever else stands in it. What is too long after all is refused by
the engine, in its own words."""

TEMPLATE_TOKENS: Final = 64
"""What the chat template puts around two messages: a few words in all that are known."""

CUT_MARK: Final = " …"


class Subject(StrEnum):
    """What the parts are parts of."""

    VIDEO = "video"
    IMAGES = "images"


@dataclass(frozen=True, slots=True)
class Note:
    """
    A text, and what it is about.

    Args:
        start, end: seconds of the clip; or the first and the last of the images, from 1.
    """

    start: float
    end: float
    text: str


@dataclass(frozen=True, slots=True)
class Stitcher:
    """
    Args:
        system: texts that stand before the prompt of every part, and so before the summary's.
        question: what was asked about each part.
        room: tokens that the notes of one prompt may have together.
        count_tokens: of a text, as the model counts.
    """

    subject: Subject
    system: Sequence[str]
    question: str
    room: int
    count_tokens: Callable[[str], int]

    def group(self, notes: Sequence[Note]) -> list[list[Note]]:
        """
        Put neighbours together as far as a prompt takes them: the prompts of one round, in order.

        Of two notes or more there are fewer groups than notes.
        """
        groups: list[list[Note]] = []
        left = 0
        for note in notes:
            fitting = self._cut(note)
            num_tokens = self.count_tokens(self._format(fitting))
            if not groups or num_tokens > left:
                groups.append([])
                left = self.room
            groups[-1].append(fitting)
            left -= num_tokens
        return groups

    def build_messages(self, group: Sequence[Note]) -> list[dict[str, Any]]:
        """The prompt that makes one text of a group's."""
        lines = [_INTRODUCTION[self.subject]]
        if self.question:
            lines += ["What was asked:", self.question]
        lines += ["What was answered:", *map(self._format, group)]
        return [
            *({"role": "system", "content": text} for text in self.system),
            {"role": "user", "content": "\n".join(lines)},
        ]

    def _format(self, note: Note) -> str:
        if self.subject is Subject.VIDEO:
            return f"[{format_time(note.start)} - {format_time(note.end)}] {note.text}"
        if note.start == note.end:
            return f"[image {note.start:.0f}] {note.text}"
        return f"[images {note.start:.0f} - {note.end:.0f}] {note.text}"

    def _cut(self, note: Note) -> Note:
        most = self.room // 2
        text, kept = note.text, note
        while (num_tokens := self.count_tokens(self._format(kept))) > most and text:
            # By the mean length of its tokens, and a little more so that it comes to an end.
            text = text[: min(len(text) - 1, len(text) * most // num_tokens)]
            kept = Note(note.start, note.end, text.rstrip() + CUT_MARK)
        return kept


_INTRODUCTION: Final[Mapping[Subject, str]] = {
    Subject.VIDEO: (
        "A video was looked at in segments, in the order of time. Below stands what was asked about "
        "each of them, and what was answered, after its time. Answer the same for the video as a whole, "
        "in one text, from these answers alone."
    ),
    Subject.IMAGES: (
        "Many images were looked at in groups, in their order. Below stands what was asked about each "
        "group, and what was answered, after its numbers. Answer the same for all the images together, "
        "in one text, from these answers alone."
    ),
}


def build_stitcher(
    subject: Subject,
    messages: Sequence[Mapping[str, Any]],
    *,
    max_model_len: int,
    max_tokens: int | None,
    count_tokens: Callable[[str], int],
) -> Stitcher:
    """
    Args:
        messages: of the item, in the engine's form; its question is the texts of all but the system's.
    """
    system = [_text_of(message) for message in messages if message["role"] == "system"]
    asked = [_text_of(message) for message in messages if message["role"] != "system"]
    question = "\n".join(filter(None, asked))
    answer = max_model_len // ANSWER_SHARE if max_tokens is None else max_tokens
    answer = min(answer, max_model_len // 2)
    around = [*system, question, _INTRODUCTION[subject], "What was asked:\nWhat was answered:\n"]
    num_around = sum(map(count_tokens, around)) + TEMPLATE_TOKENS
    room = max(max_model_len - answer - num_around, LEAST_ROOM)
    return Stitcher(subject, system, question, room, count_tokens)


class Rounds:
    """
    The rounds of one summary: which prompts follow, until one text is left.

    Args:
        prefix: of the prompts' names.

    Attributes:
        num: rounds so far; 0 where one text needed none.
        text: the summary, once it is there.
    """

    def __init__(self, stitcher: Stitcher, prefix: str) -> None:
        self.num = 0
        self.text: str | None = None
        self._stitcher = stitcher
        self._prefix = prefix
        self._groups: list[tuple[str, list[Note]]] = []  # of this round, by their prompts' names
        self._texts: dict[str, str] = {}

    def begin(self, notes: Sequence[Note]) -> dict[str, list[dict[str, Any]]]:
        """The messages of the prompts to ask next, by name; none where one text is left."""
        if len(notes) == 1:
            self.text = notes[0].text
            return {}
        self.num += 1
        self._texts = {}
        self._groups = [
            (f"{self._prefix}.s{self.num}.{place}", group)
            for place, group in enumerate(self._stitcher.group(notes))
        ]
        build = self._stitcher.build_messages
        return {name: build(group) for name, group in self._groups if len(group) > 1}

    def take(self, name: str, text: str) -> dict[str, list[dict[str, Any]]]:
        """Note a prompt's answer; as `begin`, where it was the last of its round."""
        self._texts[name] = text
        if any(len(group) > 1 and name not in self._texts for name, group in self._groups):
            return {}
        return self.begin(
            [
                group[0] if len(group) == 1 else _merge(group, self._texts[name])
                for name, group in self._groups
            ]
        )


def _merge(group: Sequence[Note], text: str) -> Note:
    """The note that takes the place of a group's."""
    return Note(group[0].start, group[-1].end, text)


def format_time(seconds: float) -> str:
    """As 1:02:03, 2:03 or 2:03.5."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    text = f"{rest // 10:02d}" + (f".{rest % 10}" if rest % 10 else "")
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{text}" if hours else f"{minutes}:{text}"


def _text_of(message: Mapping[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")
