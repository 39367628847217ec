"""
One item that is asked in parts, within one lease: what is asked, what has come, and what comes of it.

First every part that no earlier lease has answered, each by itself; then, when all are there, the summary
over their texts (`tasks.summary`). A part that failed and may do better is left out of this lease, which
then ends as a try that failed: the next one asks for that part alone. A part that failed for good keeps
its error and does not fail the others; the item fails only where no part has a text.

Knows no engine, no database and no thread but the two that call it: the one that feeds the engine, and the
one that takes its results.
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from engine.request import Result
from storage.items import Fence
from storage.parts import Answer
from tasks.engines import Prompt
from tasks.pieces import Piece, Split
from tasks.retry import Act, Verdict, clean, judge
from tasks.summary import Note, Rounds, Stitcher

CUT_SHORT: Final = Verdict(Act.RELEASE, "cut_short", "The worker stops.")
"""Parts that were not asked any more, because the worker drains: the item goes on elsewhere."""


@dataclass(frozen=True, slots=True)
class Whole:
    """
    All parts as one text.

    Args:
        result: of the last prompt, the one that gave the text; None where an earlier lease had it.
        num_prompt_tokens, num_completion_tokens, num_cached_tokens: of all parts and of the summary.
    """

    text: str
    finish_reason: str
    result: Result | None
    num_parts: int
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Move:
    """
    What follows from a step.

    Args:
        answer: to be kept.
        is_seen: all parts are there, so nothing of the item's media is needed any more.
        prompts: to be asked now.
        end: how the item ends, in this lease at least.
    """

    answer: Answer | None = None
    is_seen: bool = False
    prompts: Sequence[Prompt] = ()
    end: Whole | Verdict | None = None


class Assembly:
    """
    Args:
        prompt: of the whole item; parts and summary are asked with its parameters.
        done: what earlier leases have answered.
        media: where the item's pictures and clips come from.
        is_last_try: no other lease will follow a failure, so that it is for good.
    """

    def __init__(
        self,
        fence: Fence,
        prompt: Prompt,
        split: Split,
        stitcher: Stitcher,
        done: Sequence[Answer],
        *,
        media: Sequence[Mapping[str, Any]],
        is_last_try: bool,
    ) -> None:
        self.fence = fence
        self.media = media
        self._prompt = prompt
        self._subject = split.subject
        self.plan = split.plan
        self._is_last_try = is_last_try
        self._lock = threading.Lock()
        self._answers = {answer.number: answer for answer in done}
        self._places = {piece.number: _find_place(piece) for piece in split.pieces}
        self._unasked = deque(p for p in split.pieces if p.number not in self._answers)
        self._waiting: dict[str, Piece | None] = {}  # None for a prompt of the summary
        self._is_seen = False
        self._has_ended = False
        self._is_cut_short = False
        self._trouble: Verdict | None = None
        self._rounds = Rounds(stitcher, fence.name)
        # Prompts of the summary, by name, that are to be asked.
        self._next: dict[str, list[dict[str, Any]]] = {}
        self._num_tokens = [
            sum(answer.num_prompt_tokens for answer in done),
            sum(answer.num_completion_tokens for answer in done),
            sum(answer.num_cached_tokens for answer in done),
        ]
        self.names: tuple[str, ...] = ()
        """Of the prompts that the engine may hold."""

    # --- by the thread that feeds the engine ---------------------------------------------------------

    def ask(self) -> Prompt | None:
        """The next part's prompt; None where no part is left to be asked."""
        with self._lock:
            if not self._unasked:
                return None
            piece = self._unasked.popleft()
            name = f"{self.fence.name}.{piece.number}"
            self._waiting[name] = piece
            self.names = (*self.names, name)
            return self._build_prompt(name, piece.messages)

    def go_on(self) -> Move:
        """After the last part was asked: nothing, or what follows where nothing is waited for."""
        with self._lock:
            return self._go_on()

    def cut_short(self) -> Move:
        """Ask for no more parts. What is asked may still come, and is kept."""
        with self._lock:
            self._is_cut_short = self._is_cut_short or bool(self._unasked)
            self._unasked.clear()
            return self._go_on()

    # --- by the thread that takes its results --------------------------------------------------------

    def take(self, result: Result) -> Move:
        with self._lock:
            piece = self._waiting.pop(result.request_id)
            if piece is not None:
                answer = self._take_part(piece, result)
                return replace(self._go_on(result), answer=answer)
            if result.error is not None:
                self._trouble = self._trouble or judge(result.error)
            else:
                self._count(result)
                self._next |= self._rounds.take(result.request_id, result.outputs[0].text)
            return self._go_on(result)

    def _take_part(self, piece: Piece, result: Result) -> Answer | None:
        answer = Answer(piece.number, piece.start_s, piece.end_s)
        if result.error is None:
            self._count(result)
            output = result.outputs[0]
            answer = replace(
                answer,
                images=list(_report(piece, result)),
                text=output.text,
                finish_reason=str(output.finish_reason or "stop"),
                num_prompt_tokens=len(result.prompt_token_ids or ()),
                num_completion_tokens=len(output.token_ids),
                num_cached_tokens=result.num_cached_tokens or 0,
            )
        else:
            verdict = judge(result.error)
            is_final = verdict.act is Act.FAIL or (verdict.act is Act.RETRY and self._is_last_try)
            if not is_final:
                self._trouble = self._trouble or verdict
                return None
            answer = replace(answer, error_code=verdict.code, error_message=clean(verdict.message))
        self._answers[piece.number] = answer
        return answer

    def _count(self, result: Result) -> None:
        self._num_tokens[0] += len(result.prompt_token_ids or ())
        self._num_tokens[1] += len(result.outputs[0].token_ids)
        self._num_tokens[2] += result.num_cached_tokens or 0

    # --- what follows --------------------------------------------------------------------------------

    def _go_on(self, result: Result | None = None) -> Move:
        if self._unasked or self._waiting or self._has_ended:
            return Move()
        self.names = ()
        if self._trouble is not None or self._is_cut_short:
            return self._end(self._trouble or CUT_SHORT)
        if self._is_seen:
            return self._summarise(result)
        self._is_seen = True
        notes = self._read_notes()
        if not notes:
            failed = self._answers[min(self._answers)]
            code, message = failed.error_code or "", failed.error_message or ""
            return replace(self._end(Verdict(Act.FAIL, code, message)), is_seen=True)
        self._next = self._rounds.begin(notes)
        return replace(self._summarise(result), is_seen=True)

    def _read_notes(self) -> list[Note]:
        answers = [self._answers[number] for number in self._places]
        return [
            Note(*self._places[answer.number], answer.text)
            for answer in answers
            if answer.text is not None
        ]

    def _summarise(self, result: Result | None) -> Move:
        """Ask the next round; or end, where there is one text."""
        if self._rounds.text is not None:
            return self._end(self._build_whole(self._rounds.text, result))
        prompts = [self._build_prompt(name, messages) for name, messages in self._next.items()]
        self._next = {}
        self._waiting = dict.fromkeys(prompt.name for prompt in prompts)
        self.names = tuple(self._waiting)
        return Move(prompts=prompts)

    def _build_prompt(self, name: str, messages: Any) -> Prompt:
        return Prompt(name, messages, self._prompt.params, self._prompt.priority)

    def _build_whole(self, text: str, result: Result | None) -> Whole:
        if self._rounds.num and result is not None:
            reason: str | None = result.outputs[0].finish_reason
        else:  # of the only part that has a text
            reason = next(a.finish_reason for a in self._answers.values() if a.text is not None)
        return Whole(text, str(reason or "stop"), result, len(self._places), *self._num_tokens)

    def _end(self, end: Whole | Verdict) -> Move:
        self._has_ended = True
        return Move(end=end)


def _find_place(piece: Piece) -> tuple[float, float]:
    if piece.images is not None:
        return piece.images
    return piece.start_s or 0.0, piece.end_s or 0.0


def _report(piece: Piece, result: Result) -> Iterator[dict[str, Any]]:
    """The images of a part as a result reports them, numbered among those of the whole item."""
    for image in result.images:
        report = asdict(image)
        if piece.images is not None and report["kind"] != "video":
            report["index"] += piece.images[0] - 1
        yield report
