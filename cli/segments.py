"""
A clip that is asked about segment by segment, in this process: each by itself, then all as one text.

The cutting is `media.segments`', the second pass `tasks.summary`'s: what a service does, without one.
"""

import re
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cli.answers import Answer, PartAnswer
from cli.questions import Segmented
from engine.request import Result
from media.segments import Cut
from tasks.summary import Note, Rounds, Stitcher, Subject, build_stitcher

if TYPE_CHECKING:
    from engine import LLM

Messages = Sequence[Mapping[str, Any]]


def parse_cut(text: str) -> Cut:
    """
    Read `10s` (seconds each) or `30` (so many).

    Raises:
        ValueError, BadSegmentsError: it is none, or cannot be.
    """
    if re.fullmatch(r"[0-9]{1,9}", text):
        return Cut(count=int(text))
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?s", text):
        return Cut(seconds=float(text[:-1]))
    raise ValueError("give seconds, as 10s, or how many, as 30")


class SegmentedClip:
    """
    One clip on its way: which prompts come next, until there is an answer.

    Attributes:
        answer: once all is there.
    """

    def __init__(self, index: int, clip: Segmented, stitcher: Stitcher) -> None:
        """Raises `MediaError` where the clip cannot be read or cut."""
        self.index = index
        self.path = clip.path
        self.answer: Answer | None = None
        self._segments = clip.measure()
        self._questions = {
            f"{index}.{number}": (number, clip.ask(segment))
            for number, segment in enumerate(self._segments, 1)
        }
        self._parts: dict[int, PartAnswer] = {}
        self._results: list[Answer] = []
        self._rounds = Rounds(stitcher, str(index))

    def list_parts(self) -> dict[str, Messages]:
        """The messages of all segments, by the names of their prompts."""
        return {
            name: [{"role": "user", "content": question.content}]
            for name, (_, question) in self._questions.items()
        }

    def take(self, result: Result) -> Mapping[str, Messages]:
        """Note one answer; returns the prompts that come next, by name."""
        name = result.request_id
        if name not in self._questions:
            return self._take_summary(name, Answer.from_result(self.path, result))
        number, question = self._questions[name]
        answer = Answer.from_result(self.path, result, question.clip)
        segment = self._segments[number - 1]
        self._results.append(answer)
        self._parts[number] = PartAnswer(
            number, segment.start_s, segment.end_s, answer.text, answer.error, answer.frames
        )
        if len(self._parts) < len(self._segments):
            return {}
        parts = [self._parts[number] for number in sorted(self._parts)]
        notes = [Note(p.start_s, p.end_s, p.text) for p in parts if p.text is not None]
        if not notes:
            self._end(replace(answer, error=parts[0].error))
            return {}
        return self._go_on(self._rounds.begin(notes), answer)

    def _take_summary(self, name: str, answer: Answer) -> Mapping[str, Messages]:
        self._results.append(answer)
        if answer.text is None:
            self._end(answer)
            return {}
        return self._go_on(self._rounds.take(name, answer.text), answer)

    def _go_on(self, prompts: Mapping[str, Messages], last: Answer) -> Mapping[str, Messages]:
        if self._rounds.text is not None:
            self._end(replace(last, text=self._rounds.text, error=None))
        return prompts

    def _end(self, last: Answer) -> None:
        """The last answer, with what all prompts took."""
        seen = self._results[0]
        self.answer = replace(
            last,
            text=None if last.error else last.text,
            num_prompt_tokens=sum(one.num_prompt_tokens or 0 for one in self._results),
            num_tokens=sum(one.num_tokens or 0 for one in self._results),
            width=seen.width,
            height=seen.height,
            used_width=seen.used_width,
            used_height=seen.used_height,
            ms=round(sum(one.ms or 0.0 for one in self._results), 1),
            frames=None,
            parts=tuple(self._parts[number] for number in sorted(self._parts)),
        )


class Segments:
    """
    The clips of one run that are asked in segments, between two threads: one asks for the prompts that
    come next, the other brings the results that they follow from.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_open = 0
        self._next: deque[tuple[SegmentedClip, str, Messages]] = deque()
        self._is_closed = False

    def open(self, clip: SegmentedClip) -> None:
        with self._changed:
            self._num_open += 1

    def take(self, clip: SegmentedClip, result: Result) -> Answer | None:
        """Note a result; returns the clip's answer when it is there, once."""
        if clip.answer is not None:  # a prompt beside this one has failed, and the clip with it
            return None
        prompts = clip.take(result)
        with self._changed:
            self._next += ((clip, name, messages) for name, messages in prompts.items())
            self._num_open -= clip.answer is not None
            self._changed.notify_all()
        return clip.answer

    def wait_for_more(self) -> Iterator[tuple[SegmentedClip, str, Messages]]:
        """The prompts of summaries, until all clips have their answers."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next or not self._num_open or self._is_closed)
                if self._is_closed or not self._next:
                    return
                found = self._next.popleft()
            yield found

    def close(self) -> None:
        """Nobody takes results any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


def stitcher_for(llm: "LLM", prompt: str, max_tokens: int | None) -> Stitcher:
    """How the texts of a clip's segments are joined by this model."""
    return build_stitcher(
        Subject.VIDEO,
        [{"role": "user", "content": prompt}],
        max_model_len=llm.engine.checkpoint.max_model_len,
        max_tokens=max_tokens,
        count_tokens=llm.engine.count_tokens,
    )
