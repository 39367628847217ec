"""
`LLM`: the offline face, with the names that vLLM's users know, over one stream of results.

`generate` and `chat` collect the stream and restore order; `stream` is the native form.
"""

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from tqdm import tqdm

from engine import checkpoint as checkpoints
from engine.config import (
    ABSENT_WORDS,
    LORA_REMEDY,
    LORA_WORDS,
    UNUSED_WORDS,
    EngineConfig,
    nearest_word,
    parse_io_kwargs,
    parse_limits,
    parse_processor_kwargs,
)
from engine.engine import Engine, knows_budget, plan_rows
from engine.errors import BadConfig, BadPrompt, PromptFailedError
from engine.inputs import Request, is_conversation, is_priority, is_token_ids, layers
from engine.request import Result, SamplingParams
from media.limits import IMAGE_LIMITS

logger = logging.getLogger(__name__)

OnError = Literal["return", "raise"]
PROMPTS_BAR = "Processed prompts"


class LLM:
    """
    A model, loaded and ready.

    Args:
        model: a checkpoint folder, a hub id in the cache, or `darkroom-tiny`.
        limit_mm_per_prompt: pictures and videos one prompt may hold, e.g. `{"image": 4}`; one each
            by default. `{"frames": 64}` limits those of one clip, which else are as many as asked for.
        mm_processor_kwargs: `min_pixels` and `max_pixels` of every picture and frame, `num_frames`,
            `fps` and the like of encoded clips. What a call, a request, a prompt or a part says goes first,
            key by key, the innermost before all.
        media_io_kwargs: `{"video": {"num_frames": 32, "fps": 1}}`, the same in vLLM's other place.
        load_format: "dummy" for random weights, drawn on the device: they cost no download and no
            file, and answer nonsense at full speed.
        gpu_memory_utilization: share of the GPU to use. kv_cache_memory_bytes: KV memory, instead.
        seed: of draws whose request names none; None for another one each time. The stamp of a
            result names what its own were made with.
        chat_template: Jinja text, or the path of a file that holds it.
        needs_chat_template: whether a checkpoint that has none, where none is given, is refused at
            once; otherwise `chat` refuses, and `generate` needs none.
        device: "auto", "cpu" or "cuda".
        tensor_parallel_size: only 1.
        num_media_processes: processes that decode files, for files of strangers: a file that breaks its
            decoder then breaks nothing else. 0 decodes in threads. `close` ends them.
        image_formats: "TIFF", "HEIC" or both, which are read only where they are named here; HEIC needs
            the extra `heic`.
        max_image_pixels: of one picture file; 40 million by default. A larger one is an error before it
            is decompressed. How large the model sees pictures is `mm_processor_kwargs`' to say.
        draft_jpegs: decode large JPEGs at a half, a quarter or an eighth of their size where the model
            sees them no larger: faster, with slightly other pixels.
        encoder_cache_bytes: memory for encoded pictures, so that many prompts about one picture
            encode it once; 0 keeps none. `reset_mm_cache` empties it.
        enable_prefix_caching: keep KV rows of prompts, in memory that no other prompt needs, so that
            one that begins as another reads only the rest: many questions about one picture, a long
            system message, many outputs of one prompt. A result says how many tokens that saved
            (`num_cached_tokens`). `reset_prefix_cache` forgets them.
        deterministic: a request's tokens and logprobs do not depend, to the last bit, on what is asked
            beside it, and no kernel is chosen by what it takes at the start. Slower: see
            docs/measurements.md. Not together with prefix caching.
        enforce_eager: no CUDA graphs: a GPU gets each decode step one kernel at a time.
        quantization: "fp8" for products in fp8: faster on a Hopper GPU or a later one, and a little
            less exact. On a CPU it shows what they would answer, and is slow.
        kv_cache_dtype: "fp8" keeps what was read in fp8: half the memory of bfloat16, so that more
            requests fit, and a little less exact. Faster where reading it back is what takes the time.

    The other words are `EngineConfig`'s, and vLLM's. A word of vLLM's that has no use here is said
    once in the log.

    Raises:
        BadConfig: a value or a checkpoint that cannot work. Said before the weights are loaded, but
            for the weights themselves and for too little memory left beside them on a GPU.
        TypeError: a word that nobody knows.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
        load_format: str = "auto",
        dtype: str = "auto",
        device: str = "auto",
        revision: str | None = None,
        seed: int | None = 0,
        gpu_memory_utilization: float = 0.9,
        kv_cache_memory_bytes: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        limit_mm_per_prompt: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        media_io_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | Path | None = None,
        needs_chat_template: bool = False,
        tensor_parallel_size: int = 1,
        num_media_threads: int | None = None,
        num_media_processes: int = 0,
        image_formats: Sequence[str] = (),
        max_image_pixels: int = IMAGE_LIMITS.max_pixels,
        draft_jpegs: bool = False,
        encoder_cache_bytes: int = 256 << 20,
        enable_prefix_caching: bool | None = None,
        deterministic: bool = False,
        enforce_eager: bool = False,
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        **words: Any,
    ) -> None:
        _check_words(words)
        if tensor_parallel_size != 1:
            raise BadConfig("tensor_parallel_size must be 1: one engine runs on one GPU.")
        config = EngineConfig(
            model=str(model),
            tokenizer=tokenizer,
            revision=revision,
            trust_remote_code=trust_remote_code,
            load_format=load_format,
            dtype=str(dtype).removeprefix("torch."),
            device=device,
            seed=secrets.randbits(63) if seed is None else seed,
            limits=parse_limits(limit_mm_per_prompt),
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            chat_template=_template_text(chat_template),
            num_media_threads=num_media_threads,
            num_media_processes=num_media_processes,
            image_formats=tuple(image_formats),
            max_image_pixels=max_image_pixels,
            draft_jpegs=draft_jpegs,
            encoder_cache_bytes=encoder_cache_bytes,
            enable_prefix_caching=enable_prefix_caching or False,
            uses_graphs=not enforce_eager,
            deterministic=deterministic,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            media=parse_io_kwargs(media_io_kwargs) | parse_processor_kwargs(mm_processor_kwargs),
        )
        checkpoint = checkpoints.read_checkpoint(config)
        if needs_chat_template and not (config.chat_template or checkpoint.tokenizer.chat_template):
            raise BadConfig(
                f"The model {config.model!r} has no chat template. Give one as chat_template=, a text or "
                "a file (--chat-template FILE)."
            )
        if knows_budget(config, checkpoint):
            plan_rows(config, checkpoint)  # what cannot work is said before a long load
        self.engine = Engine(config, checkpoint, checkpoints.load_weights(checkpoint, config))

    def stream(
        self,
        requests: Iterable[Request | Any],
        params: SamplingParams | None = None,
    ) -> Iterator[Result]:
        """
        Run any number of requests; yield each result the moment it is ready, in no order.

        Args:
            requests: `Request`s, or prompts in any form that `generate` takes; pulled a little ahead
                of the work and no further, in a thread of their own: a source may be slow, or wait
                for an earlier result, and holds nobody up.
            params: for requests that bring none.

        A request's `priority` counts among the 32 or so that are pulled ahead, not among those that
        the source still holds. Of those with one priority, whoever may write most tokens begins first,
        within bounds: see `engine/waiting.py`.
        """

        forms = [requests] if _is_one_prompt(requests) else requests
        return self.engine.stream(_as_request(form, params) for form in forms)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        on_error: OnError = "return",
    ) -> list[Result]:
        """
        Answer one prompt or many, in order.

        Args:
            prompts: a text, token ids, a dict with `prompt` (or `prompt_token_ids`) and
                `multi_modal_data`, or a list of them.
            sampling_params: one for all, or one each; None for the model's own defaults.
            use_tqdm: a bar, none, or a callable that makes one.
            priority: of each prompt, the lowest first; results stay in the order of the prompts.
            on_error: "return" puts a failed prompt's result, with its `error`, in its place;
                "raise" raises the first one after all have run; the exception keeps all results.

        Raises:
            BadPrompt: the lengths of prompts and parameters differ.
            PromptFailedError: with on_error="raise"; a ValueError too where the prompt is at fault.
        """
        _refuse_lora(lora_request)
        _refuse("tokenization_kwargs", tokenization_kwargs)
        forms = [prompts] if _is_one_prompt(prompts) else list(prompts)
        requests = [
            replace(request, mm_processor_kwargs=layers(mm_processor_kwargs, request))
            for request in (f if isinstance(f, Request) else Request(prompt=f) for f in forms)
        ]
        return self._collect(requests, sampling_params, priority, use_tqdm, on_error)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
        chat_template: str | Path | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        on_error: OnError = "return",
    ) -> list[Result]:
        """
        Answer one conversation (a list of messages, or one message) or many (a list of such lists),
        in order.

        Pictures are parts of a message: `image_url` with a data URL, or `image` with the picture
        itself; the model's placeholders are put in their place. What users typed stays text.
        Other arguments as in `generate`.
        """
        del chat_template_content_format  # both forms of content are read alike
        _refuse_lora(lora_request)
        _refuse("tools", tools)
        _refuse("tokenization_kwargs", tokenization_kwargs)
        template = _template_text(chat_template)
        requests = [
            Request(
                messages=conversation,
                chat_template=template,
                chat_template_kwargs=chat_template_kwargs,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                mm_processor_kwargs=mm_processor_kwargs,
            )
            for conversation in _conversations(messages)
        ]
        return self._collect(requests, sampling_params, priority, use_tqdm, on_error)

    def get_default_sampling_params(self) -> SamplingParams:
        """
        What a prompt without parameters is answered with: the model's generation config.

        To change one of them: `dataclasses.replace(llm.get_default_sampling_params(), max_tokens=100)`.
        """
        return self.engine.checkpoint.defaults

    def get_tokenizer(self) -> Any:
        """The model's tokenizer, transformers' own object."""
        return self.engine.checkpoint.tokenizer

    def reset_mm_cache(self) -> None:
        """Forget the encoded pictures that were kept for prompts to come."""
        self.engine.reset_cache()

    def reset_prefix_cache(self) -> bool:
        """Forget the KV rows that were kept for prompts to come; True."""
        self.engine.reset_prefixes()
        return True

    def close(self) -> None:
        """
        Stop; the object is of no use afterwards. `with LLM(...) as llm:` does it at the end.

        Requests in flight end in a result with the code `engine_closed`; new ones raise `EngineClosed`.
        """
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _collect(
        self,
        requests: Sequence[Request],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        use_tqdm: bool | Callable[..., Any],
        on_error: OnError,
    ) -> list[Result]:
        """Run requests under their numbers, put the results in order, and give them their names."""
        if on_error not in get_args(OnError):
            raise BadPrompt(f"is {on_error!r}", where="on_error", remedy="Give return or raise")
        params = _one_each(sampling_params, len(requests), "params")
        priorities = _one_each(priority, len(requests), "priorities")
        numbered = [
            replace(
                request,
                request_id=str(index),
                params=params[index] if request.params is None else request.params,
                priority=request.priority if priorities[index] is None else priorities[index],
            )
            for index, request in enumerate(requests)
        ]
        # The engine orders what it has pulled ahead; here all are known, so all are put in order.
        numbered.sort(key=lambda request: request.priority if is_priority(request.priority) else 0)
        results: list[Result | None] = [None] * len(requests)
        make_bar = tqdm if use_tqdm is True else use_tqdm
        bar = make_bar(total=len(requests), desc=PROMPTS_BAR) if callable(make_bar) else None
        try:
            for result in self.engine.stream(numbered):
                index = int(result.request_id)
                name = requests[index].request_id or result.request_id
                results[index] = replace(result, request_id=name)
                if bar is not None:
                    bar.update(1)
        finally:
            if bar is not None:
                bar.close()
        finished = [result for result in results if result is not None]
        assert len(finished) == len(requests), "every request ends in exactly one result"
        if on_error == "raise" and any(result.error is not None for result in finished):
            raise PromptFailedError.of(finished)
        return finished


def _as_request(form: Any, params: SamplingParams | None) -> Request:
    request = form if isinstance(form, Request) else Request(prompt=form)
    return request if request.params is not None else replace(request, params=params)


def _is_one_prompt(prompts: Any) -> bool:
    return isinstance(prompts, str | Mapping | Request) or is_token_ids(prompts)


def _conversations(messages: Any) -> Sequence[Any]:
    if isinstance(messages, Mapping):
        return [[messages]]
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise BadPrompt(
            f"is a {type(messages).__name__}",
            where="messages",
            remedy='Give [{"role": "user", "content": "..."}], or a list of such lists',
        )
    return [messages] if is_conversation(messages) else messages


def _one_each(given: Any, count: int, what: str) -> Sequence[Any]:
    if isinstance(given, Sequence):
        if len(given) != count:
            raise BadPrompt(
                f"({count}) and {what} ({len(given)}) must be the same",
                where="The lengths of prompts",
                remedy="Give one for all, or one each",
            )
        return given
    return [given] * count


def _refuse(name: str, given: object) -> None:
    if given:
        raise BadPrompt("is not supported", where=name, remedy="Leave it out")


def _refuse_lora(given: object) -> None:
    if given:
        raise BadPrompt(
            "is not supported: no adapter is applied per request",
            where="lora_request",
            remedy=LORA_REMEDY,
        )


def _check_words(words: Mapping[str, Any]) -> None:
    known = [*LLM.__init__.__annotations__, *UNUSED_WORDS, *ABSENT_WORDS]
    for word, value in words.items():
        if word not in known:
            raise TypeError(
                f"LLM() got an unexpected keyword argument {word!r}.{nearest_word(word, known)}"
            )
        if word in LORA_WORDS and value:
            raise BadConfig(
                f"{word} is not supported: no adapter is applied per request. {LORA_REMEDY}."
            )
        if word in ABSENT_WORDS and value:
            raise BadConfig(
                f"{word} is not supported: it would change what the model answers. Leave it out."
            )
        logger.warning("word_unused name=%s: vLLM's word has no use here and is ignored", word)


def _template_text(given: str | Path | None) -> str | None:
    """A template, given as itself or as the path of a file."""
    if given is None or (isinstance(given, str) and "{" in given):
        return given
    try:
        return Path(given).read_text("utf-8")
    except (OSError, TypeError, ValueError) as error:
        raise BadConfig(
            "chat_template is neither a template (it holds no '{') nor a file that can be read."
        ) from error
