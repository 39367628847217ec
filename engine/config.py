"""
What an engine is built with: one frozen value, checked before anything is loaded.

The environment is never read here; whoever starts the process passes values in.
"""

import difflib
import json
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import BadConfig
from media.errors import BadFrameSamplingError
from media.frames import MAX_MIN_CHANGE, build_sampling
from media.limits import IMAGE_LIMITS, MOST_PIXELS, OPT_IN_FORMATS

BUNDLED_MODEL = "darkroom-tiny"
BUNDLED_FOLDER = Path(__file__).parents[1] / "models" / BUNDLED_MODEL
MODALITIES = ("image", "video")
FRAMES = "frames"
"""Beside the modalities in `limit_mm_per_prompt`: of one clip. Absent: as many as media reads."""
LIMIT_OPTIONS = ("count", "width", "height", "num_frames")
QUANTIZATIONS = (None, "fp8")
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3")  # vLLM's words, of which the last two are one
LOAD_FORMATS = ("auto", "safetensors", "dummy")
DTYPES = ("auto", "float32", "float16", "bfloat16", "float", "half")
DEFAULT_LIMITS = {"image": 1, "video": 1}
ABSENT_MODALITIES = ("audio", "vision_chunk")  # vLLM's; a limit of 0 for them asks for nothing
AREA_KEYS = ("min_pixels", "max_pixels")
KEEP_ALL = -1  # vLLM's num_frames for every frame of a clip
SAMPLING_KEYS = ("num_frames", "fps", "start_s", "end_s", "keyframes", "dedupe_frames")
CROP_KEYS = ("num_crops",)  # of pictures, where a model cuts them into tiles
IMAGE_KEYS = (*AREA_KEYS, *CROP_KEYS)
DETAILS = ("auto", "low", "high")  # of a picture, as OpenAI's wire has them
EDGES: Mapping[Any, str] = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}

# Words of vLLM's constructor that have no use here: accepted, and said once in the log.
UNUSED_WORDS = (
    "allowed_local_media_path",
    "allowed_media_domains",
    "async_scheduling",
    "attention_backend",
    "block_size",
    "code_revision",
    "compilation_config",
    "config_format",
    "cpu_offload_gb",
    "data_parallel_size",
    "disable_custom_all_reduce",
    "disable_log_stats",
    "disable_mm_preprocessor_cache",
    "distributed_executor_backend",
    "download_dir",
    "enable_chunked_prefill",
    "enable_mm_embeds",
    "enable_sleep_mode",
    "fully_sharded_loras",
    "generation_config",
    "hf_token",
    "interleave_mm_strings",
    "logprobs_mode",
    "max_logprobs",
    "lora_dtype",
    "max_cpu_loras",
    "max_lora_rank",
    "max_loras",
    "max_seq_len_to_capture",
    "mm_encoder_tp_mode",
    "mm_processor_cache_gb",
    "model_impl",
    "num_gpu_blocks_override",
    "pipeline_parallel_size",
    "runner",
    "scheduling_policy",
    "served_model_name",
    "skip_mm_profiling",
    "swap_space",
    "task",
    "tokenizer_mode",
    "tokenizer_revision",
    "worker_cls",
)

# Adapters per request: docs/decisions/0014 says what they would take.
LORA_WORDS = ("default_mm_loras", "enable_lora", "lora_modules")
LORA_REMEDY = (
    "Merge the adapter into the model that it was trained on (peft: merge_and_unload, then "
    "save_pretrained) and give that folder as the model"
)

# Words that would change what is computed, so that ignoring them would be a lie: refused unless empty.
ABSENT_WORDS = (
    *LORA_WORDS,
    "enable_prompt_embeds",
    "hf_overrides",
    "logits_processors",
    "override_generation_config",
    "speculative_config",
    "video_pruning_rate",
)


@dataclass(frozen=True, slots=True)
class MediaOptions:
    """
    How media are sized and sampled, as one level says: the engine, a call, a request.

    Attributes:
        image, video: `min_pixels` and `max_pixels` of pictures, and of the frames of clips; or
            `num_crops` of pictures. A model takes the one or the other.
        sampling: of encoded clips, the fields of `media.frames.FrameSampling` that were given;
            `num_frames` of None keeps all.
    """

    image: Mapping[str, int] = field(default_factory=dict)
    video: Mapping[str, int] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def __or__(self, inner: "MediaOptions") -> "MediaOptions":
        """Key by key, what the inner level says goes first."""
        return MediaOptions(
            {**self.image, **inner.image},
            {**self.video, **inner.video},
            {**self.sampling, **inner.sampling},
        )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """
    Attributes:
        model: a checkpoint folder, a hub id, or `darkroom-tiny` for the bundled model.
        tokenizer: folder or hub id of another tokenizer; None for the model's own.
        revision: of a hub id.
        trust_remote_code: whether code that lies beside the weights may run.
        load_format: "dummy" draws random weights on the device instead of reading any: for measuring
            speed, which does not depend on what a model has learned. Otherwise safetensors.
        dtype: "auto" is the checkpoint's on a GPU and float32 on a CPU, where it is exact.
        device: "auto" is the GPU where there is one.
        seed: of random draws whose request names none.
        limits: pictures and videos that one prompt may hold.
        max_model_len: prompt and output together, in tokens; None for the model's own maximum.
        max_num_seqs: sequences that decode together; None for 512 on a GPU and 256 on a CPU.
        max_num_batched_tokens: prompt tokens of one prefill call; a longer prompt is read in pieces of
            so many, between decode steps of the others. None for 16896 on a GPU and 8192 on a CPU.
        kv_cache_memory_bytes: memory for KV rows; None for a share of what the device has free.
        gpu_memory_utilization: that share, of the whole device, 0 to 1.
        media: area of pictures and frames after resampling, where it is not the checkpoint's, and
            which frames of encoded clips are taken.
        chat_template: Jinja text instead of the tokenizer's own.
        num_media_threads: threads that decode and resample; None for the cores that are there, and at
            most 8 beside a GPU.
            Callables that fetch pictures wait in threads of their own.
        num_media_processes: processes that decode files in the threads' place, for files of strangers:
            they have no network and no files, and may die; 0 decodes in the threads.
        image_formats: of `media.limits.OPT_IN_FORMATS`, those that are read besides the usual ones.
        max_image_pixels: of one picture file, judged before it is decompressed.
        draft_jpegs: whether a JPEG at least twice as large as the model sees it may be decoded at a
            half, a quarter or an eighth of its size: faster, with slightly other pixels, so that
            answers may be others. For families that only resample.
        encoder_cache_bytes: memory for encoded pictures that are kept, so that many prompts about
            one picture encode it once; 0 keeps none.
        enable_prefix_caching: whether KV rows of prompts that have been read are kept, so that a prompt
            that begins as another, pictures included, reads only the rest.
        uses_graphs: whether a GPU gets each decode step as one CUDA graph; False launches it one
            kernel at a time, which is slower.
        deterministic: whether a request's tokens and logprobs are the same to the last bit whatever is
            asked beside it: pictures and prompts go through the model one by one, and a decode step
            always has the same number of places. Nor is a kernel chosen by what it takes at the start,
            which is another number each time. Slower, and not together with prefix caching.
        quantization: "fp8" multiplies in fp8, with scales by row, in the layers of text and
            encoder: faster on Hopper and later, and a little less exact. Any checkpoint will do.
        kv_cache_dtype: "fp8" keeps KV rows in fp8: half the memory of bfloat16, so that more
            sequences fit, and half the reading where it is what takes the time. A little less exact.
    """

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    load_format: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    limits: Mapping[str, int] = field(default_factory=lambda: dict(DEFAULT_LIMITS))
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    media: MediaOptions = field(default_factory=MediaOptions)
    chat_template: str | None = None
    num_media_threads: int | None = None
    num_media_processes: int = 0
    image_formats: tuple[str, ...] = ()
    max_image_pixels: int = IMAGE_LIMITS.max_pixels
    draft_jpegs: bool = False
    encoder_cache_bytes: int = 256 << 20
    enable_prefix_caching: bool = False
    uses_graphs: bool = True
    deterministic: bool = False
    quantization: str | None = None
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise BadConfig("model must name a checkpoint folder, a hub id, or darkroom-tiny.")
        if self.dtype not in DTYPES:
            raise BadConfig(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.load_format not in LOAD_FORMATS:
            raise BadConfig(
                f"load_format must be one of {', '.join(LOAD_FORMATS)}, got {self.load_format!r}."
            )
        if self.quantization not in QUANTIZATIONS:
            raise BadConfig(
                f"quantization must be None or 'fp8', got {self.quantization!r}. A checkpoint that was "
                "quantised beforehand is not supported."
            )
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise BadConfig(
                f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, got "
                f"{_show(self.kv_cache_dtype)}."
            )
        for name in (
            "max_model_len",
            "kv_cache_memory_bytes",
            "num_media_threads",
            "max_num_seqs",
            "max_num_batched_tokens",
        ):
            _check_positive(name, getattr(self, name), may_be_none=True)
        _check_positive("max_image_pixels", self.max_image_pixels, may_be_none=False)
        if self.max_image_pixels > MOST_PIXELS:
            raise BadConfig(
                f"max_image_pixels={self.max_image_pixels} is over the {MOST_PIXELS} that Pillow decodes."
            )
        if self.image_formats:
            _check_formats(self.image_formats)
        for name in ("encoder_cache_bytes", "num_media_processes"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, numbers.Integral) or number < 0:
                raise BadConfig(f"{name} must be a whole number of 0 or more, got {number!r}.")
        for name in ("enable_prefix_caching", "deterministic"):
            given = getattr(self, name)
            if not isinstance(given, bool):
                raise BadConfig(f"{name} must be True or False, got {_show(given)}.")
        if self.deterministic and self.enable_prefix_caching:
            raise BadConfig(
                "deterministic and enable_prefix_caching exclude each other: a prompt that begins with "
                "another's rows is not computed as one that was read whole."
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise BadConfig(f"seed must be a whole number, got {self.seed!r}.")
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise BadConfig(f"gpu_memory_utilization must be over 0 and at most 1, got {share!r}.")
        for area in (self.media.image, self.media.video):
            smallest, largest = area.get("min_pixels", 0), area.get("max_pixels", math.inf)
            if smallest > largest:
                raise BadConfig(
                    f"min_pixels={smallest} is over max_pixels={largest}. Give a min_pixels of at "
                    "most max_pixels."
                )

    @property
    def folder_or_id(self) -> str:
        """Where transformers finds the checkpoint."""
        if self.model == BUNDLED_MODEL and not Path(self.model).is_dir():
            return str(BUNDLED_FOLDER)
        return self.model


def _check_formats(names: Iterable[str]) -> None:
    from media.images import can_read  # Pillow, which reading settings does not need otherwise

    for name in names:
        if name not in OPT_IN_FORMATS:
            raise BadConfig(
                f"image_formats takes {' and '.join(OPT_IN_FORMATS)}, what is not read otherwise, got "
                f"{name!r}."
            )
        if not can_read(name):
            raise BadConfig(
                f"image_formats: {name} is not installed here. Run pip install -e '.[heic]' in "
                "Darkroom's folder."
            )


def _check_positive(name: str, value: object, *, may_be_none: bool) -> None:
    if value is None and may_be_none:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise BadConfig(f"{name} must be a whole number of 1 or more, got {_show(value)}.")


def parse_limits(given: Mapping[str, Any] | None) -> dict[str, int]:
    """
    Read `limit_mm_per_prompt` in both of vLLM's forms.

    Args:
        given: `{"image": 4}` or `{"image": {"count": 4, "width": 512, "height": 512}}`, or mixed.
            Only `count` refuses a prompt. A modality that is left out keeps its default of 1. Not
            vLLM's is `{"frames": 64}`: of each clip.

    Raises:
        BadConfig: an unknown modality or option, or a count that is no whole number of 0 or more.
    """
    limits = dict(DEFAULT_LIMITS)
    for modality, limit in _items("limit_mm_per_prompt", given):
        if modality in ABSENT_MODALITIES and _count_of(modality, limit) == 0:
            continue
        if modality == FRAMES:
            _check_positive(f"limit_mm_per_prompt[{FRAMES!r}]", limit, may_be_none=False)
            limits[FRAMES] = int(limit)
            continue
        if modality not in MODALITIES:
            raise BadConfig(
                f"limit_mm_per_prompt has an unknown modality {modality!r}: "
                f"use {' or '.join(MODALITIES)}."
            )
        limits[modality] = _count_of(modality, limit)
    return limits


def _items(name: str, given: Mapping[str, Any] | None) -> Iterable[tuple[str, Any]]:
    if not isinstance(given, Mapping | None):
        raise BadConfig(f"{name} must be a dict, got a {type(given).__name__}.")
    return (given or {}).items()


def _count_of(modality: str, limit: object) -> int:
    where = f"limit_mm_per_prompt[{modality!r}]"
    count = limit
    if isinstance(limit, Mapping):
        unknown = [option for option in limit if option not in LIMIT_OPTIONS]
        if unknown:
            raise BadConfig(
                f"{where} has an unknown option {unknown[0]!r}: use {', '.join(LIMIT_OPTIONS)}."
            )
        for option, value in limit.items():
            if option != "count":
                _check_positive(f"{where}[{option!r}]", value, may_be_none=True)
        count = limit.get("count", DEFAULT_LIMITS.get(modality, 1))
    if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 0:
        raise BadConfig(f"{where} must be a whole number of 0 or more, got {count!r}.")
    return int(count)


def parse_processor_kwargs(
    given: Mapping[str, Any] | None, name: str = "mm_processor_kwargs"
) -> MediaOptions:
    """
    Read `mm_processor_kwargs`: what stands in no scope is for pictures and clips alike.

    Args:
        name: where it stands, for what is said of it.

    Raises:
        BadConfig: another key, which would otherwise be dropped in silence; or a value that cannot be.
    """
    of_videos = (*AREA_KEYS, *SAMPLING_KEYS)
    known = {"images_kwargs": IMAGE_KEYS, "videos_kwargs": of_videos}
    scopes: dict[str, dict[str, Any]] = {scope: {} for scope in known}
    unscoped: dict[str, Any] = {}
    for key, value in _items(name, given):
        if key in known:
            scopes[key] = _read_options(f"{name}[{key!r}]", value, known[key])
        else:
            unscoped |= _read_options(name, {key: value}, (*of_videos, *CROP_KEYS))
    image = {**unscoped, **scopes["images_kwargs"]}
    video = {**unscoped, **scopes["videos_kwargs"]}
    return MediaOptions(
        image={key: image[key] for key in IMAGE_KEYS if key in image},
        video={key: video[key] for key in AREA_KEYS if key in video},
        sampling=_checked_sampling(
            name, {key: video[key] for key in SAMPLING_KEYS if key in video}
        ),
    )


def parse_part_options(part: Mapping[str, Any], keys: Collection[str], where: str) -> MediaOptions:
    """
    Read what a part says of its own picture or clip; a key that is None is as good as absent.

    Args:
        keys: of `IMAGE_KEYS` and `SAMPLING_KEYS`, those that such a part takes; others are not looked at.
        where: the part's place, for what is said of it.

    Raises:
        BadConfig: a value that cannot be.
    """
    given = {key: part[key] for key in keys if part.get(key) is not None}
    return parse_processor_kwargs(given, where)


def parse_io_kwargs(given: Mapping[str, Any] | None) -> MediaOptions:
    """
    Read `media_io_kwargs`: which frames of encoded clips are taken.

    Raises:
        BadConfig: another option: pictures are always RGB, transparency laid on white.
    """
    name = "media_io_kwargs"
    sampling: dict[str, Any] = {}
    for modality, options in _items(name, given):
        known = SAMPLING_KEYS if modality == "video" else ()
        sampling |= _read_options(f"{name}[{modality!r}]", options, known)
    return MediaOptions(sampling=_checked_sampling(name, sampling))


def _checked_sampling(name: str, sampling: dict[str, Any]) -> dict[str, Any]:
    """Each value has been looked at; here they are looked at together."""
    try:
        build_sampling(sampling)
    except BadFrameSamplingError as error:
        raise BadConfig(f"{name}: {error}") from error
    return sampling


def _read_options(name: str, given: Any, known: Collection[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for key, value in _items(name, given):
        where = f"{name}[{key!r}]"
        if key == "size" and "max_pixels" in known:
            edges = {EDGES.get(edge, edge): pixels for edge, pixels in _items(where, value)}
            options |= _read_options(where, edges, AREA_KEYS)
        elif key not in known:
            raise BadConfig(
                f"{name} has the key {json.dumps(str(key)[:40])}, which this model does not take: "
                f"use {' and '.join(known) or 'no options at all'}."
            )
        elif key == "fps":
            options[key] = _number(where, value, "a finite number over 0", lambda fps: fps > 0)
        elif key in ("start_s", "end_s"):
            wanted = "a finite number of seconds, 0 or more"
            options[key] = _number(where, value, wanted, lambda time_s: time_s >= 0)
        elif key == "keyframes" or (key == "dedupe_frames" and isinstance(value, bool)):
            options[key] = _boolean(where, value)
        elif key == "dedupe_frames":
            wanted = f"true, false, or a number over 0 and below {MAX_MIN_CHANGE:g}"
            options[key] = _number(where, value, wanted, lambda least: 0 < least < MAX_MIN_CHANGE)
        elif key == "num_frames" and isinstance(value, int) and value == KEEP_ALL:
            options[key] = None
        else:
            _check_positive(where, value, may_be_none=False)
            options[key] = int(value)
    return options


def _number(name: str, value: object, wanted: str, fits: Callable[[float], bool]) -> float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and fits(number):
            return number
    raise BadConfig(f"{name} must be {wanted}, got {_show(value)}.")


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise BadConfig(f"{name} must be true or false, got {_show(value)}.")
    return value


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest_word(word: str, known: list[str]) -> str:
    """A hint for an unknown constructor word: the known one that looks most like it."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""
