"""
The port to an engine, and the adapter that fills it with our own `LLM`.

The worker knows prompts and results, and neither torch nor a model: an instant engine in tests, and
another server's engine one day, go behind the same few names.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from engine.errors import EngineFailure, ResultError
from engine.request import Result, SamplingParams
from engine.usage import EngineUsage
from media.errors import DecoderFailedError, DecodersAwayError
from media.limits import IMAGE_LIMITS
from tasks.config import MediaLimits
from tasks.errors import DecodersLostError, DeviceLostError, EngineLostError

if TYPE_CHECKING:
    from engine import LLM


@dataclass(frozen=True, slots=True)
class Prompt:
    """
    One request on its way to the engine.

    Args:
        name: comes back as the result's `request_id`; no other prompt in this process has it.
        messages: in the form of `LLM.chat`; media as data URLs, bytes, or callables that give bytes.
        priority: among the prompts that the engine holds: lower runs first.
    """

    name: str
    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    priority: int = 0


class EnginePort(Protocol):
    """Several threads may stream at once; their prompts share the device's steps."""

    @property
    def limits(self) -> MediaLimits:
        """Images and videos that one prompt may hold, and frames that are looked at of one clip."""

    @property
    def defaults(self) -> SamplingParams:
        """The model's own parameters, where a request gives none."""

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its answer may have together."""

    def count_tokens(self, text: str) -> int:
        """Of a text as it stands in a prompt, give or take what joins it to its neighbours."""

    def measure_clip(self, encoded: bytes) -> tuple[float, ...]:
        """
        When the frames of an encoded clip are shown, in seconds from the first one; found where clips
        are decoded.

        Raises:
            MediaError: it is none.
            EngineLostError: as `stream`.
        """

    def stream(self, prompts: Iterable[Prompt]) -> Iterator[Result]:
        """
        Yield one result for each prompt, the moment it is ready, in no order.

        Closing the iterator drops what is in flight. `prompts` may wait until an earlier result was
        taken, so it is not pulled in the thread that takes them, or only between two.

        Raises:
            EngineLostError: nothing more will come from this process.
        """

    def abort(self, names: Collection[str]) -> None:
        """Drop prompts of any stream, if they are still there; nobody waits for their results."""

    def read_progress(self) -> float:
        """A number that is another one whenever a prompt got on, in the device or on the way to it."""

    def read_usage(self) -> EngineUsage | None:
        """
        What it has done and holds; None of an engine that does not count.

        Never waits, neither for the device nor for whoever uses it.
        """

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """
    What a worker's engine is started with, as `LLM`'s own arguments are called.

    Args:
        num_media_processes: None for one a core, two cores left to the worker itself.
        max_image_pixels: None for `LLM`'s own.
    """

    model: str
    limits: MediaLimits = field(default_factory=MediaLimits)
    max_model_len: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    num_media_processes: int | None = None
    image_formats: tuple[str, ...] = ()
    max_image_pixels: int | None = None
    draft_jpegs: bool = False
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    mm_processor_kwargs: Mapping[str, Any] | None = None


CORES_BESIDE: Final = 2
"""For the thread that feeds the device, and for all that fetches and commits."""

MAX_MEDIA_PROCESSES: Final = 16
"""Where nobody says a number: more pictures a second than one GPU reads."""

_FAILURE: Final = EngineFailure.code


class LLMEngine:
    """Our own engine behind the port."""

    def __init__(self, llm: "LLM", limits: MediaLimits) -> None:
        self._llm = llm
        self._limits = limits

    @property
    def limits(self) -> MediaLimits:
        return self._limits

    @property
    def defaults(self) -> SamplingParams:
        return self._llm.get_default_sampling_params()

    @property
    def max_model_len(self) -> int:
        return self._llm.engine.checkpoint.max_model_len

    def measure_clip(self, encoded: bytes) -> tuple[float, ...]:
        from media.pool import PoolClosedError

        try:
            return self._llm.engine.measure_clip(encoded)
        except DecodersAwayError as error:
            raise DecodersLostError from error
        except PoolClosedError as error:
            raise DecoderFailedError from error

    def count_tokens(self, text: str) -> int:
        return self._llm.engine.count_tokens(text)

    def stream(self, prompts: Iterable[Prompt]) -> Iterator[Result]:
        from engine import EngineError, Request

        requests = (
            Request(
                messages=prompt.messages,
                params=prompt.params,
                request_id=prompt.name,
                priority=prompt.priority,
            )
            for prompt in prompts
        )
        try:
            for result in self._llm.stream(requests):
                if result.error is not None:
                    self._check(result.error)
                yield result
        except (EngineError, EngineLostError):
            raise
        except RuntimeError as error:  # torch's own, from outside any one request's work
            raise DeviceLostError from error

    def abort(self, names: Collection[str]) -> None:
        self._llm.engine.abort_named(names)

    def read_progress(self) -> float:
        return self._llm.engine.progress_at_s

    def read_usage(self) -> EngineUsage:
        return self._llm.engine.read_usage()

    def close(self) -> None:
        self._llm.close()

    def _check(self, error: ResultError) -> None:
        """A request failed: is it the request, or is the engine lost?"""
        if error.code == DecodersAwayError.code:
            raise DecodersLostError
        if error.code == _FAILURE:
            self._check_device()

    def _check_device(self) -> None:
        import torch

        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLostError from error


def load_engine(options: EngineOptions) -> LLMEngine:
    """
    Load a model; this takes seconds to minutes.

    Raises:
        BadConfig: the engine's own word for what cannot work.
    """
    from engine import LLM
    from media.pool import count_cores

    num_processes = options.num_media_processes
    if num_processes is None:
        num_processes = min(max(count_cores() - CORES_BESIDE, 1), MAX_MEDIA_PROCESSES)
    llm = LLM(
        model=options.model,
        limit_mm_per_prompt=options.limits.model_dump(exclude_none=True),
        max_model_len=options.max_model_len,
        device=options.device,
        dtype=options.dtype,
        num_media_processes=num_processes,
        image_formats=options.image_formats,
        max_image_pixels=options.max_image_pixels or IMAGE_LIMITS.max_pixels,
        draft_jpegs=options.draft_jpegs,
        quantization=options.quantization,
        kv_cache_dtype=options.kv_cache_dtype,
        enable_prefix_caching=options.enable_prefix_caching,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        chat_template=options.chat_template,
        mm_processor_kwargs=options.mm_processor_kwargs,
        needs_chat_template=True,  # nothing but conversations is asked here
    )
    return LLMEngine(llm, options.limits)
