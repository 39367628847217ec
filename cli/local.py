"""
An engine in this very process: load it, ask it, and hand its answers over in order.

torch and transformers are imported where a model is needed and nowhere before: that takes
seconds, which no help text should cost.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from cli.answers import Answer, InOrder, one_line
from cli.errors import CannotStartError, EngineStoppedError, ExitCode
from cli.garbage import settle
from cli.inputs import Input, Refused
from cli.interrupts import Interrupts
from cli.questions import Question, Segmented
from cli.segments import SegmentedClip, Segments, stitcher_for
from cli.show import Screen
from engine.config import BUNDLED_MODEL
from engine.errors import EngineError
from engine.request import SamplingParams
from media.errors import MediaError

if TYPE_CHECKING:
    from engine import LLM, Request


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the engine is started with, as its own arguments are called."""

    model: str = BUNDLED_MODEL
    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    max_pixels: int | None = None


def run(
    inputs: Sequence[Input | Refused],
    ask: Callable[[Input], Question | Segmented],
    screen: Screen,
    *,
    options: EngineOptions,
    params: SamplingParams,
    limits: Mapping[str, int],
) -> ExitCode:
    """
    Ask about every input and show the answers: what `caption` and `describe` have in common.

    Args:
        ask: called for each input that was not refused, when the engine has room for it.
        limits: pictures and clips that one prompt may hold, by "image" and "video".
    """
    refused = [found for found in inputs if isinstance(found, Refused)]
    total = len(inputs)
    if len(refused) == total:  # nothing to load a model for
        for found in refused:
            screen.show(Answer.from_problem(found.path, found.problem))
        return ExitCode.SOME_FAILED
    with Interrupts() as interrupts:
        questions = (
            found if isinstance(found, Refused) else ask(found)
            for found in takewhile(lambda _: not interrupts.is_asked, inputs)
        )
        try:
            with screen.waiting(f"Loading {options.model}"):
                llm = load_llm(options, limits)
            settle()
            with closing(llm), screen.progress(total):
                interrupts.can_drain = True
                answer_all(llm, questions, params, count=screen.count, show=screen.show)
        except KeyboardInterrupt:
            interrupts.is_asked = True  # what is finished has been shown
        except CannotStartError as error:
            screen.complain(str(error))
            return ExitCode.USAGE
        except EngineStoppedError as error:
            screen.complain(str(error))
        if interrupts.is_asked:
            screen.stopped(total)
            return ExitCode.INTERRUPTED
    screen.sum_up(total)
    is_done = screen.num_done == total and not screen.num_failed
    return ExitCode.DONE if is_done else ExitCode.SOME_FAILED


def load_llm(options: EngineOptions, limits: Mapping[str, int]) -> "LLM":
    """
    Load a model.

    Raises:
        CannotStartError: the engine is not installed, or a setting makes no sense to it.
    """
    try:
        from engine import LLM
    except ModuleNotFoundError as error:
        raise CannotStartError(
            f"The engine is not installed here ({error.name} is missing). "
            "Run pip install -e '.[engine]' in Darkroom's folder."
        ) from error
    except (ImportError, OSError) as error:  # a library of torch's that lacks one of its own
        raise CannotStartError(
            f"The engine cannot be loaded here: {one_line(str(error))}"
        ) from error
    try:
        return LLM(
            model=options.model,
            limit_mm_per_prompt=limits,
            max_model_len=options.max_model_len,
            mm_processor_kwargs={"max_pixels": options.max_pixels} if options.max_pixels else None,
            max_num_seqs=_max_num_seqs(options.device),
            dtype=options.dtype,
            device=options.device,
        )
    except EngineError as error:
        raise CannotStartError(str(error)) from error


def _max_num_seqs(device: str) -> int:
    """
    How many pictures are read before the first text is written.

    A GPU needs many to be busy. On a CPU they are the wait for the first text, and what Ctrl-C has to
    wait for: see docs/measurements.md, 2026-11-24.
    """
    from torch import cuda

    is_cpu = device == "cpu" or (device == "auto" and not cuda.is_available())
    return 32 if is_cpu else 256


def answer_all(
    llm: "LLM",
    questions: Iterable[Question | Segmented | Refused],
    params: SamplingParams,
    *,
    count: Callable[[Answer], None],
    show: Callable[[Answer], None],
) -> None:
    """
    Ask every question.

    Args:
        questions: taken one by one, as the engine has room for them; what was refused has its
            place among them.
        count: told of each answer the moment it is there.
        show: given each answer once, in the order of the questions. When the run is cut short it
            is given what is finished, gaps and all.

    Raises:
        EngineStoppedError: the engine gave up; what was finished has been shown.
    """
    from engine import Request

    asked: dict[str, Question | SegmentedClip] = {}
    held = InOrder()
    segmented = Segments()

    def settle(index: int, answer: Answer) -> None:
        held.put(index, answer)
        count(answer)

    def build_requests() -> "Iterator[Request]":
        for index, question in enumerate(questions):
            if isinstance(question, Refused):
                settle(index, Answer.from_problem(question.path, question.problem))
            elif isinstance(question, Segmented):
                stitcher = stitcher_for(llm, question.prompt, params.max_tokens)
                try:
                    clip = SegmentedClip(index, question, stitcher)
                except MediaError as problem:
                    settle(index, Answer.from_problem(question.path, problem))
                    continue
                segmented.open(clip)
                for name, messages in clip.list_parts().items():
                    asked[name] = clip
                    yield Request(messages=messages, request_id=name)
            else:
                asked[str(index)] = question
                messages = [{"role": "user", "content": question.content}]
                yield Request(messages=messages, request_id=str(index))
        for clip, name, messages in segmented.wait_for_more():
            asked[name] = clip
            yield Request(messages=messages, request_id=name)

    try:
        for result in llm.stream(build_requests(), params):
            question = asked.pop(result.request_id)
            if isinstance(question, SegmentedClip):
                whole = segmented.take(question, result)
                if whole is None:
                    continue
                settle(question.index, whole)
            else:
                answer = Answer.from_result(question.path, result, question.clip)
                settle(int(result.request_id), answer)
            for ready in held.take_ready():
                show(ready)
    except EngineError as error:
        raise EngineStoppedError(str(error)) from error
    finally:
        segmented.close()
        for ready in held.take_rest():
            show(ready)
