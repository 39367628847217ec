"""
A checkpoint on disk or in the hub's cache: its configs, tokenizer, template and weights.

The hub itself is never asked: what runs is what somebody chose to fetch, and a machine without a
network runs it too.

Everything cheap is read and checked before the weights are, so that a wrong folder costs a moment.
"""

import copy
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer
from transformers.utils import logging as progress

from engine.attention import TEXT_ATTENTION, VISION_ATTENTION
from engine.config import LORA_REMEDY, EngineConfig
from engine.errors import BadConfig, BadPrompt, BadSamplingParams
from engine.families import FAMILIES, Entry, find_entry
from engine.families.protocol import Description, Family, resize
from engine.kernels.quantised import FP8, can_multiply
from engine.kernels.rows import can_hold_fp8
from engine.kernels.timing import choosing
from engine.kv import KVShape
from engine.request import SamplingParams
from engine.swaps import MAX_KERNEL_DIM, fuse

Loaded = TypeVar("Loaded")

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_ADAPTER = "adapter_config.json"  # peft's
# In a weight's name. Older versions of transformers also wrote what positions are turned by.
_OF_LAYER = re.compile(r"\.(layers?|blocks)\.\d+\.(?!.*inv_freq$)")
_NO_FP8 = "needs a GPU of compute capability 8.9 or later (Ada, Hopper). Leave it out."


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """
    Attributes:
        folder: where all its files lie.
        config: transformers' config object.
        tokenizer: a fast tokenizer.
        entry: where its family's classes are found.
        family: bound to the config; `load_weights` attaches the model.
        defaults: how to answer where a request does not say, as its author chose.
        eos_token_ids: ids that end an output.
        max_model_len: prompt and output together, in tokens.
        dtype, device: as computed from the engine's config.
        kv_dtype: of KV rows: dtype, or fp8.
        revision: the commit, where the hub's cache knows it.
    """

    folder: Path
    config: Any
    tokenizer: Any
    entry: Entry
    family: Family
    defaults: SamplingParams
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    dtype: torch.dtype
    device: torch.device
    revision: str | None
    kv_dtype: torch.dtype

    @property
    def kv_shape(self) -> KVShape:
        """What a KV row of an engine holds."""
        return self.family.kv_shape(self.kv_dtype)


def read_checkpoint(engine: EngineConfig) -> Checkpoint:
    """
    Read all of a checkpoint but its weights.

    Raises:
        BadConfig: not found, not supported, or without a part that is needed.
    """
    folder = _get_folder(engine.folder_or_id, engine.revision)
    _check_adapter(engine, folder)
    _check_code(engine, folder)
    options = {"trust_remote_code": engine.trust_remote_code, "local_files_only": True}
    written = _read_json(engine, folder / _CONFIG) or {}
    entry = find_entry(written)
    if entry is None and isinstance(written.get("model_type"), str):
        known = sorted({name.partition("/")[0] for name in FAMILIES})
        raise BadConfig(
            f"The model type {written['model_type'][:40]!r} has no adapter, so it cannot run. There are "
            f"adapters for {', '.join(known)}; `darkroom models` shows what each takes. "
            "docs/adding-a-family.md shows how one is added."
        )
    _check_not_quantised(engine, written)
    config = _read("config.json", engine, lambda: _read_config(entry, folder, options))
    assert entry is not None, "a config without a type cannot be read"
    other = engine.tokenizer if engine.tokenizer != engine.folder_or_id else None
    tokenizer_folder = _get_folder(other, None) if other else folder  # the revision is the model's
    tokenizer = _read(
        "tokenizer",
        engine,
        lambda: AutoTokenizer.from_pretrained(
            tokenizer_folder,
            fix_mistral_regex=_mends_splits(engine, written, tokenizer_folder),
            # Where the config's class is ours, its folder may name code for it, which nobody needs.
            **({**options, "config": config} if entry.config else options),
        ),
    )
    if not tokenizer.is_fast:
        raise BadConfig("The model's tokenizer has no fast form (tokenizer.json), which is needed.")
    together = (
        _read_json(engine, folder / "processor_config.json") or {}
    )  # as transformers 5 saves them
    pictures = _read_json(engine, folder / "preprocessor_config.json") or together.pop(
        "image_processor", None
    )
    clips = _read_json(engine, folder / "video_preprocessor_config.json") or together.pop(
        "video_processor", None
    )
    if pictures is None and not {"vision_config", "img_processor"}.isdisjoint(written):
        raise BadConfig("The model has no preprocessor_config.json, so its pictures have no size.")
    family = _read(
        "config.json and preprocessor_config.json that go together",
        engine,
        lambda: _build_family(
            entry,
            Description(config, tokenizer, _told(pictures), _told(clips), _told(together)),
        ),
    )
    _check_sizes(family, engine)
    for token, token_id in (
        (family.image_placeholder, family.image_token_id),
        (family.video_placeholder, family.video_token_id),
    ):
        if token is not None and tokenizer.convert_tokens_to_ids(token) != token_id:
            raise BadConfig(
                f"The tokenizer does not fit the model: {token} is not its token {token_id}. Give "
                "the model's own tokenizer.json."
            )
    older = (_read_json(engine, folder / "chat_template.json") or {}).get("chat_template")
    own = tokenizer.chat_template  # read with it, from chat_template.jinja before its config
    if "image" in family.modalities:
        # A processor's goes before that of the tokenizer alone, which may know no pictures.
        tokenizer.chat_template = together.get("chat_template") or older or own
    tokenizer.chat_template = tokenizer.chat_template or older or family.chat_template
    generation = _read_json(engine, folder / _GENERATION) or {}
    device = _device(engine)
    dtype = _read("dtype", engine, lambda: _dtype(engine, config, device))
    if engine.quantization == "fp8" and device.type == "cuda":
        _check_fp8(device, dtype)
    keeps_fp8 = engine.kv_cache_dtype != "auto"
    if keeps_fp8:
        _check_fp8_rows(engine.kv_cache_dtype, family.kv_shape(FP8), device)
    return Checkpoint(
        folder,
        config,
        tokenizer,
        entry,
        family,
        _read(_GENERATION, engine, lambda: _defaults(generation)),
        _eos_token_ids({_GENERATION: generation, _CONFIG: written}, family, tokenizer),
        _read("context length", engine, lambda: _max_model_len(engine, family)),
        dtype,
        device,
        folder.name if folder.parent.name == "snapshots" else None,
        FP8 if keeps_fp8 else dtype,
    )


def _read_config(entry: Entry | None, folder: Path, options: dict[str, Any]) -> Any:
    if entry is None:
        raise ValueError("no model_type")
    return entry.load_config_class().from_pretrained(folder, **options)


def _mends_splits(engine: EngineConfig, written: Mapping[str, Any], folder: Path) -> bool | None:
    """
    Whether transformers shall mend how a tokenizer splits texts: Mistral 3 was published with a pattern
    that is not the one of its training, which transformers knows by the age of the files.

    Told None it warns and mends nothing, of any family that it does not know better; told yes it rebuilds
    what splits in another way. Of text models of Mistral's nobody has looked which pattern they have:
    the warning stays.
    """
    if written.get("model_type") != "mistral3":
        return None if written.get("model_type") == "mistral" else False
    splits = (_read_json(engine, folder / "tokenizer.json") or {}).get("pre_tokenizer") or {}
    return [part["type"] for part in splits.get("pretokenizers", ())][:1] == ["Split"]


def _told(words: Mapping[str, Any] | None) -> dict[str, Any]:
    """Less its nulls: to transformers they are silence, as a word that is not there."""
    return {word: value for word, value in (words or {}).items() if value is not None}


def _build_family(entry: Entry, description: Description) -> Family:
    family = entry.load_family()(description)
    for token, token_id in (
        (family.image_placeholder, family.image_token_id),
        (family.video_placeholder, family.video_token_id),
    ):
        if token_id is not None and not (isinstance(token_id, int) and token is not None):
            raise ValueError("no token stands for a picture")
    return family


def _check_adapter(engine: EngineConfig, folder: Path) -> None:
    """An adapter beside weights would be left out, and nobody would know."""
    if (folder / _ADAPTER).is_file():
        raise BadConfig(
            f"The model {engine.model!r} has a LoRA adapter in its folder ({_ADAPTER}), which would "
            f"not be applied. {LORA_REMEDY}. If that was done, remove the adapter's files."
        )


def _check_not_quantised(engine: EngineConfig, written: Mapping[str, Any]) -> None:
    """Its weights are packed: other names, other shapes, and layers that must not be fused."""
    text = written.get("text_config")
    for part in (written, text if isinstance(text, dict) else {}):
        if found := part.get("quantization_config"):
            method = found.get("quant_method") if isinstance(found, dict) else None
            raise BadConfig(
                f"The model {engine.model!r} was quantised beforehand "
                f"({str(method or 'by a method without a name')[:40]}), which is not supported. Give its "
                "weights in bfloat16 or float16; quantization='fp8' makes them fp8 while they are loaded, "
                "on a GPU of compute capability 8.9 or later."
            )


def _check_code(engine: EngineConfig, folder: Path) -> None:
    """A tokenizer that is code of the checkpoint's runs only where somebody said that it may."""
    written = _read_json(engine, folder / "tokenizer_config.json") or {}
    if not engine.trust_remote_code and "AutoTokenizer" in (written.get("auto_map") or ()):
        raise BadConfig(
            f"The model {engine.model!r} brings code of its own for its tokenizer. It runs only with "
            "trust_remote_code=True (--trust-remote-code): read it first."
        )


def _check_sizes(family: Family, engine: EngineConfig) -> None:
    try:
        resize(family.image_area, engine.media.image)
        if "video" in family.modalities:
            resize(family.video_area, engine.media.video)
    except BadPrompt as error:
        raise BadConfig(f"mm_processor_kwargs: {error}") from error


def load_weights(checkpoint: Checkpoint, engine: EngineConfig) -> Any:
    """
    Load the weights, ready to run: on the device, attention through our functions.

    Raises:
        BadConfig: no safetensors, or weights that do not fit the config.
    """
    model_class = checkpoint.entry.load_model_class()
    # A config that names our attention could not build a second model, so the model gets a copy.
    config = copy.deepcopy(checkpoint.config)
    if engine.load_format == "dummy":
        model = draw_model(model_class, config, checkpoint)
        _prepare(model, checkpoint, engine)
        return model
    with _silence():
        model, report = _read(
            "weights in safetensors that fit its config and",
            engine,
            lambda: model_class.from_pretrained(
                checkpoint.folder,
                config=config,
                local_files_only=True,
                dtype=checkpoint.dtype,
                use_safetensors=True,
                output_loading_info=True,
            ),
        )
    if report["missing_keys"]:  # transformers would go on with random numbers in their place
        raise BadConfig(
            f"The model {engine.model!r} lacks {len(report['missing_keys'])} of its weights, "
            f"{min(report['missing_keys'])} among them. Get a complete copy."
        )
    if left_out := [name for name in report["unexpected_keys"] if _OF_LAYER.search(name)]:
        raise BadConfig(
            f"The model {engine.model!r} has {len(left_out)} weights of layers for which its config.json "
            f"has no place, {min(left_out)} among them. Give the config.json that belongs to its weights."
        )
    _prepare(model, checkpoint, engine)
    return model


def _prepare(model: Any, checkpoint: Checkpoint, engine: EngineConfig) -> None:
    with choosing(by_time=not engine.deterministic):
        prepare_model(model, checkpoint, engine.quantization)


def draw_model(model_class: type[Any], config: Any, checkpoint: Checkpoint) -> Any:
    """
    Build a model with random weights, the same ones each time, on the device and in its dtype.

    Never converted: a buffer of frequencies cast to 16 bits would stand elsewhere than a loaded one.
    """
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = checkpoint.dtype
    devices = [checkpoint.device] if checkpoint.device.type == "cuda" else []
    was = torch.get_default_dtype()
    torch.set_default_dtype(checkpoint.dtype)
    try:
        with torch.random.fork_rng(devices), checkpoint.device:
            torch.manual_seed(0)
            model = model_class(config)
    finally:
        torch.set_default_dtype(was)
    model.tie_weights()
    return model


@contextmanager
def _silence() -> Iterator[None]:
    """
    Whoever embeds the engine owns the streams: transformers draws on stderr, in pipes too, and reports
    there in many lines which weights do not fit. We say so in one.
    """
    were_shown = progress.is_progress_bar_enabled()
    reporter = logging.getLogger("transformers.modeling_utils")
    was_disabled = reporter.disabled
    progress.disable_progress_bar()  # type: ignore[no-untyped-call]
    reporter.disabled = True  # a higher level would have it report on sharding
    try:
        yield
    finally:
        reporter.disabled = was_disabled
        if were_shown:
            progress.enable_progress_bar()  # type: ignore[no-untyped-call]


def prepare_model(model: Any, checkpoint: Checkpoint, quantization: str | None = None) -> None:
    """Move a built model to the device, route its attention through our functions, fuse layers."""
    model.eval().requires_grad_(False).to(checkpoint.device)
    # Set after construction: from_pretrained would look for an installed flash-attn by this name.
    for name in model.config.sub_configs:
        getattr(model.config, name)._attn_implementation = VISION_ATTENTION
    model.config.get_text_config()._attn_implementation = TEXT_ATTENTION
    fuse(model, fp8=quantization == "fp8")
    checkpoint.family.attach(model)


def _get_folder(name: str, revision: str | None) -> Path:
    """
    The folder of a model that is named by its folder, or by its hub id.

    NOTE: transformers is given folders only. Of an id it would ask the hub, and even where it is told
    to look at local files only, huggingface_hub does so for the headers of requests it never sends
    (2.4, 2026).
    """
    if Path(name).is_dir():
        if revision is not None:
            raise BadConfig(
                f"revision={revision!r} names a state of a model on the hub, and {name!r} is a "
                "folder. Leave it out."
            )
        return Path(name)
    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise BadConfig(
            f"The model {name!r} cannot be loaded: there is no such folder. {_REMEDY}"
        ) from error
    if not isinstance(config, str):
        adapter = try_to_load_from_cache(name, _ADAPTER, revision=revision)
        if isinstance(adapter, str):
            return Path(adapter).parent  # where it is refused
        raise BadConfig(
            f"The model {name!r} cannot be loaded: there is no such folder, and it is not in the "
            f"hub's cache. Fetch it with `{_download(name, revision)}`."
        )
    return Path(config).parent


def _download(hub_id: str, revision: str | None) -> str:
    """The command that puts a model into the hub's cache."""
    return f"hf download {hub_id}" + (f" --revision {revision}" if revision else "")


_REMEDY = "Give a checkpoint folder, a hub id that is in the cache, or darkroom-tiny."


def _read(what: str, engine: EngineConfig, load: Callable[[], Loaded]) -> Loaded:
    """Vendor errors stop here: their texts name paths and hosts, ours name what is missing."""
    try:
        return load()
    except BadConfig:
        raise
    except Exception as error:
        # The edge of three libraries: tokenizers raises bare `Exception`, and transformers indexes
        # and calls whatever it finds in a file. A file that cannot be read has many faces.
        remedy = f"Fetch all of it with `{_download(engine.model, engine.revision)}`."
        if Path(engine.folder_or_id).is_dir():
            remedy = _REMEDY
        raise BadConfig(
            f"The model {engine.model!r} cannot be loaded: it has no {what} that can be read. "
            + remedy
        ) from error


def _read_json(engine: EngineConfig, path: Path) -> dict[str, Any] | None:
    """One of the checkpoint's JSON files, or None where it has none of that name."""
    if not path.exists():
        return None
    content = _read(path.name, engine, lambda: json.loads(path.read_text("utf-8")))
    return content if isinstance(content, dict) else None


def _defaults(generation: dict[str, Any]) -> SamplingParams:
    try:
        return SamplingParams.from_generation_config(generation)
    except BadSamplingParams as error:
        raise BadConfig(f"The model's generation_config.json cannot be used: {error}") from error


def _max_model_len(engine: EngineConfig, family: Family) -> int:
    most: int = family.text_config.max_position_embeddings
    if engine.max_model_len is not None and engine.max_model_len > most:
        raise BadConfig(
            f"max_model_len={engine.max_model_len} is more than the model's maximum of {most} "
            "positions. Give at most that."
        )
    return engine.max_model_len or most


def _check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    if dtype != torch.bfloat16:
        raise BadConfig(
            "quantization='fp8' needs dtype bfloat16 on a GPU, not "
            f"{str(dtype).removeprefix('torch.')}. Give dtype='bfloat16', or leave quantization out."
        )
    if not can_multiply(device, dtype):
        raise BadConfig(f"quantization='fp8' {_NO_FP8}")


def _check_fp8_rows(word: str, shape: KVShape, device: torch.device) -> None:
    if not can_hold_fp8(device):
        raise BadConfig(f"kv_cache_dtype={word!r} {_NO_FP8}")
    widest = max(layer.dim for layer in shape.layers)
    if device.type == "cuda" and widest > MAX_KERNEL_DIM:
        raise BadConfig(
            f"kv_cache_dtype={word!r} is not supported on a GPU for a model with heads wider than "
            f"{MAX_KERNEL_DIM}, and this one's are {widest} wide. Leave it out."
        )


def _device(engine: EngineConfig) -> torch.device:
    name = engine.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise BadConfig(f"device must be auto, cpu or cuda, got {name!r}.")
    if device.index:  # kernels and events go to the first GPU that a process sees
        raise BadConfig(
            f"device={name!r} is not supported. Give device='cuda', and set "
            f"CUDA_VISIBLE_DEVICES={device.index} before the process starts."
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadConfig("device is cuda, but torch sees no GPU. Use device='cpu'.")
    return device


def _dtype(engine: EngineConfig, config: Any, device: torch.device) -> torch.dtype:
    if engine.dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        found = config.dtype if config.dtype is not None else torch.bfloat16
        return found if isinstance(found, torch.dtype) else getattr(torch, str(found))
    names = {"float": "float32", "half": "float16"}
    return getattr(torch, names.get(engine.dtype, engine.dtype))  # type: ignore[no-any-return]


def _eos_token_ids(
    files: Mapping[str, Mapping[str, Any]], family: Family, tokenizer: Any
) -> tuple[int, ...]:
    """
    All that may end an output, whoever says it: often one file names what ends a text, and another
    what ends a turn.

    Args:
        files: as they are written. What transformers assumes where they are silent is no end: in this
            vocabulary it may be a word.
    """
    found: list[int] = []
    for name, content in files.items():
        text = content.get("text_config")
        for part in (content, text if isinstance(text, dict) else {}):
            said = part.get("eos_token_id")
            ids = said if isinstance(said, list) else [said]
            found += (index for index in ids if index is not None)
        if not all(type(index) is int and index >= 0 for index in found):
            raise BadConfig(
                f"The model's {name} has an eos_token_id that is no token's id. Give whole numbers from "
                "0, one or a list of them, or leave it out: the tokenizer's end is known."
            )
    if family.turn_end is not None:
        found.append(tokenizer.convert_tokens_to_ids(family.turn_end))
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(found))
