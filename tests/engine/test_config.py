"""What cannot work is said in one line before anything runs."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import LLM
from engine.config import (
    EngineConfig,
    MediaOptions,
    parse_io_kwargs,
    parse_limits,
    parse_processor_kwargs,
)
from engine.errors import BadConfig
from engine.families import FAMILIES
from engine.families.protocol import AreaLimits
from tests.engine.pictures import GREEDY, PICTURE, draw, token_ids

Change = Callable[[Path], Any]


def media_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("media")}


def refusal(model: str, **words: Any) -> str:
    """The one line that says why there is no engine; nothing is left running."""
    before = media_threads()
    with pytest.raises(BadConfig) as caught:
        LLM(model, **words)
    message = str(caught.value)

    assert "\n" not in message
    assert message.endswith(".")
    assert media_threads() <= before  # others may have ended meanwhile
    assert isinstance(caught.value, ValueError)
    return message


def rewrite(name: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def reweigh(change: Callable[[dict[str, torch.Tensor], str], Any]) -> Change:
    """Change the weights, given the name of one of them."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = load_file(path)
        change(weights, next(name for name in weights if name.endswith("down_proj.weight")))
        save_file(weights, path, metadata={"format": "pt"})

    return apply


def remove(*names: str) -> Change:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def write(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


# --- checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["/nowhere/model", "a b/c d", "a/b/c"])
def test_model_that_is_not_there_is_told(model: str) -> None:
    assert refusal(model) == (
        f"The model '{model}' cannot be loaded: there is no such folder. Give a checkpoint folder, "
        "a hub id that is in the cache, or darkroom-tiny."
    )


def test_folder_that_is_no_checkpoint_is_told() -> None:
    assert refusal(".") == (
        "The model '.' cannot be loaded: it has no config.json that can be read. Give a "
        "checkpoint folder, a hub id that is in the cache, or darkroom-tiny."
    )


def test_model_must_have_a_name() -> None:
    assert refusal("").startswith("model must name a checkpoint folder")


MODEL_TYPES = sorted({name.partition("/")[0] for name in FAMILIES})
BROKEN: dict[str, tuple[Change, str]] = {
    "no config": (remove("config.json"), "it has no config.json that can be read"),
    "half a config": (write("config.json", "{"), "it has no config.json that can be read"),
    "a list for a config": (write("config.json", "[]"), "it has no config.json that can be read"),
    "another model": (
        rewrite("config.json", lambda config: config.update(model_type="bert")),
        "The model type 'bert' has no adapter, so it cannot run. There are adapters for "
        f"{', '.join(MODEL_TYPES)}; `darkroom models` shows what each takes. "
        "docs/adding-a-family.md shows how one is added.",
    ),
    "another patch": (
        rewrite("config.json", lambda config: config["vision_config"].update(spatial_merge_size=4)),
        "This checkpoint has other patches than of 2 frames each",
    ),
    "no tokenizer.json": (remove("tokenizer.json"), "it has no tokenizer that can be read"),
    "no tokenizer at all": (
        remove("tokenizer.json", "tokenizer_config.json"),
        "The tokenizer does not fit the model: <|image_pad|> is not its token 268.",
    ),
    "no processor": (
        remove("preprocessor_config.json"),
        "The model has no preprocessor_config.json",
    ),
    "half a processor": (
        write("preprocessor_config.json", "{"),
        "it has no preprocessor_config.json that can be read",
    ),
    "half of the defaults": (
        write("generation_config.json", "{"),
        "it has no generation_config.json that can be read",
    ),
    "impossible defaults": (
        rewrite("generation_config.json", lambda c: c.update(temperature=7, do_sample=True)),
        "The model's generation_config.json cannot be used: temperature must be in [0, 2]",
    ),
    "no weights": (remove("model.safetensors"), "it has no weights in safetensors"),
    "other bytes": (write("model.safetensors", "none"), "it has no weights in safetensors"),
    "one weight missing": (
        reweigh(lambda weights, name: weights.pop(name)),
        "lacks 1 of its weights, model.language_model.layers.0.mlp.down_proj.weight among them",
    ),
    "one weight of another shape": (
        reweigh(lambda weights, name: weights.update({name: weights[name][1:].clone()})),
        "it has no weights in safetensors that fit its config",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_checkpoint_is_told_what_it_lacks(
    tiny_folder: Path, tmp_path: Path, what: str
) -> None:
    change, message = BROKEN[what]
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    change(folder)

    assert message in refusal(str(folder))


def test_processors_may_be_saved_in_one_file(tiny_folder: Path, tmp_path: Path, llm: LLM) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    pictures = json.loads((folder / "preprocessor_config.json").read_text())
    clips = {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}}
    together = {"image_processor": pictures, "video_processor": clips}
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps(together))
    moved = LLM(str(folder))
    prompt = {"prompt": PICTURE, "multi_modal_data": {"image": draw(1, 200, 100)}}

    assert token_ids(llm.generate(prompt, GREEDY, use_tqdm=False)) == token_ids(
        moved.generate(prompt, GREEDY, use_tqdm=False)
    )
    area = moved.engine.checkpoint.family.video_area
    assert isinstance(area, AreaLimits)
    assert 56 * 56 == area.max_pixels


def test_tokenizer_of_another_model_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["content"] = token["content"].upper()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))

    assert "does not fit the model" in refusal(str(tiny_folder), tokenizer=str(other))
    assert "there is no such folder" in refusal(str(tiny_folder), tokenizer="/nowhere")


# --- settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "start"),
    [
        ({"dtype": "int8"}, "dtype must be one of auto, float32, float16, bfloat16, float, half,"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda, got 'tpu'."),
        ({"device": "meta"}, "device must be auto, cpu or cuda, got 'meta'."),
        ({"max_model_len": 5000}, "max_model_len=5000 is more than the model's maximum of 4096"),
        ({"max_model_len": 0}, "max_model_len must be a whole number of 1 or more, got 0."),
        ({"max_model_len": "4k"}, "max_model_len must be a whole number of 1 or more, got '4k'."),
        ({"max_num_seqs": 2.5}, "max_num_seqs must be a whole number of 1 or more, got 2.5."),
        ({"max_num_batched_tokens": True}, "max_num_batched_tokens must be a whole number"),
        ({"num_media_threads": 0}, "num_media_threads must be a whole number of 1 or more, got 0."),
        ({"seed": "x"}, "seed must be a whole number, got 'x'."),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization must be over 0 and at most 1,"),
        ({"gpu_memory_utilization": "a"}, "gpu_memory_utilization must be over 0 and at most 1,"),
        (
            {"kv_cache_memory_bytes": 10**6},
            "The memory for KV rows holds 1937 tokens, but one sequence may have "
            "max_model_len=4096. Lower max_model_len, or raise kv_cache_memory_bytes=1000000.",
        ),
        ({"limit_mm_per_prompt": "image=2"}, "limit_mm_per_prompt must be a dict, got a str."),
        ({"mm_processor_kwargs": ["a"]}, "mm_processor_kwargs must be a dict, got a list."),
        (
            {"mm_processor_kwargs": {"min_pixels": 200, "max_pixels": 100}},
            "min_pixels=200 is over max_pixels=100.",
        ),
        ({"chat_template": "/nowhere.jinja"}, "chat_template is neither a template"),
    ],
)
def test_setting_that_cannot_work_is_told(
    tiny_folder: Path, words: dict[str, Any], start: str
) -> None:
    assert refusal(str(tiny_folder), **words).startswith(start)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_told(tiny_folder: Path) -> None:
    assert refusal(str(tiny_folder), device="cuda") == (
        "device is cuda, but torch sees no GPU. Use device='cpu'."
    )


def test_settings_are_checked_before_the_weights_are_read(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()

    assert refusal(str(folder), max_model_len=5000).startswith("max_model_len=5000")
    budget = {"kv_cache_memory_bytes": 10**6}
    assert refusal(str(folder), **budget).startswith("The memory for KV rows holds 1937 tokens")


def test_cpu_has_room_for_one_whole_context(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.runner.CPU_KV_BYTES", 1000)
    with LLM(str(tiny_folder), device="cpu") as llm:
        assert 4096 == llm.engine._scheduler._slabs.largest_slab


def test_dtype_is_exact_on_a_cpu_unless_it_is_given(tiny_folder: Path) -> None:
    dtypes = {"auto": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
    for name, expected in dtypes.items():
        llm = LLM(str(tiny_folder), dtype=name)
        weights = llm.engine._runner._head.weight

        assert expected == weights.dtype == llm.engine._runner._rows.keys[0].dtype


def test_limits_come_in_both_forms() -> None:
    assert {"image": 1, "video": 1} == parse_limits(None) == parse_limits({})
    assert {"image": 4, "video": 1} == parse_limits({"image": 4})
    options = {"count": 5, "width": 512, "height": 512}
    clips = {"count": 2, "num_frames": 32, "width": 512, "height": 512}
    assert {"image": 5, "video": 2} == parse_limits({"image": options, "video": clips})
    assert {"image": 5, "video": 0} == parse_limits({"image": options, "video": 0})
    assert {"image": 1, "video": 1, "frames": 64} == parse_limits({"frames": 64})
    for frames in (0, -1, 1.5, True, None, "64", {"count": 4}):
        with pytest.raises(BadConfig, match="frames"):
            parse_limits({"frames": frames})
    assert {"image": 1, "video": 1} == parse_limits({"image": {"width": 512}})
    assert {"image": 3, "video": 1} == parse_limits({"image": {"count": 3, "width": None}})
    others = {"audio": 0, "vision_chunk": {"count": 0}}
    assert {"image": 1, "video": 1} == parse_limits(others)


@pytest.mark.parametrize(
    ("limits", "start"),
    [
        ({"audio": 1}, "limit_mm_per_prompt has an unknown modality 'audio': use image or video."),
        (
            {"image": -1},
            "limit_mm_per_prompt['image'] must be a whole number of 0 or more, got -1.",
        ),
        ({"image": "2"}, "limit_mm_per_prompt['image'] must be a whole number of 0 or more,"),
        ({"image": True}, "limit_mm_per_prompt['image'] must be a whole number of 0 or more,"),
        ({"image": {"count": None}}, "limit_mm_per_prompt['image'] must be a whole number"),
        ({"image": {"counts": 2}}, "limit_mm_per_prompt['image'] has an unknown option 'counts':"),
        ({"image": {"count": 2, "width": 0}}, "limit_mm_per_prompt['image']['width'] must be"),
        ([("image", 2)], "limit_mm_per_prompt must be a dict, got a list."),
    ],
)
def test_bad_limits_are_told(limits: Any, start: str) -> None:
    with pytest.raises(BadConfig) as caught:
        parse_limits(limits)

    assert str(caught.value).startswith(start)


def test_area_comes_in_every_scope() -> None:
    area = {"min_pixels": 100, "max_pixels": 200}
    forms: list[dict[str, Any]] = [
        area,
        {"size": {"shortest_edge": 100, "longest_edge": 200}},
        {"images_kwargs": area, "videos_kwargs": area},
        {"images_kwargs": {"size": {"shortest_edge": 100}}, "max_pixels": 200, "min_pixels": 100},
        {"max_pixels": np.int64(200), "min_pixels": 100},
    ]

    assert [MediaOptions(area, area)] * 5 == [parse_processor_kwargs(form) for form in forms]
    assert MediaOptions() == parse_processor_kwargs(None)


def test_scopes_of_pictures_and_clips_leave_each_other_alone() -> None:
    scopes = [
        ("images_kwargs", {"max_pixels": 200}),
        ("videos_kwargs", {"max_pixels": 100, "fps": 2}),
    ]
    for order in (scopes, scopes[::-1]):
        found = parse_processor_kwargs({**dict(order), "min_pixels": 50, "num_frames": 8})

        assert {"min_pixels": 50, "max_pixels": 200} == found.image
        assert {"min_pixels": 50, "max_pixels": 100} == found.video
        assert {"num_frames": 8, "fps": 2.0} == found.sampling
    inner = {"images_kwargs": {"max_pixels": 200}}
    assert {"max_pixels": 200} == parse_processor_kwargs({**inner, "max_pixels": 100}).image
    assert {"max_pixels": 200} == parse_processor_kwargs({"max_pixels": 100, **inner}).image


def test_frames_of_clips_are_read_from_media_io_kwargs() -> None:
    for options in ({"num_frames": 8}, {"fps": 0.5}, {"num_frames": 8, "fps": 0.5}):
        assert options == parse_io_kwargs({"video": options}).sampling
    assert {"num_frames": None} == parse_io_kwargs({"video": {"num_frames": -1}}).sampling
    assert {} == parse_io_kwargs({"image": {}}).sampling
    asked = {"start_s": 1, "end_s": 2.5, "keyframes": True, "dedupe_frames": 4}
    assert asked == parse_io_kwargs({"video": asked}).sampling


@pytest.mark.parametrize(
    "options",
    [
        {"image": {"image_mode": "L"}},
        {"image": {"rgba_background_color": [0, 0, 0]}},
        {"video": {"backend": "opencv"}},
        {"video": {"num_frames": 0}},
        {"video": {"fps": "2"}},
        {"video": {"end_s": 0}},
        {"video": {"start_s": 2, "end_s": 2}},
        {"video": {"keyframes": "yes"}},
        {"audio": {"rate": 1}},
        {"video": 5},
        [],
    ],
)
def test_bad_media_io_is_told(tiny_folder: Path, options: Any) -> None:
    assert refusal(str(tiny_folder), media_io_kwargs=options).startswith("media_io_kwargs")


@pytest.mark.parametrize(
    "area",
    [
        {"images_kwargs": {"fps": 2}},
        {"images_kwargs": 3},
        {"fps": 0},
        {"fps": "fast"},
        {"num_frames": 1.5},
        {"num_crops": 0},
        {"size": 4},
        {"size": {"width": 4}},
        {"max_pixels": 0},
        {"max_pixels": "9"},
    ],
)
def test_bad_area_is_told(area: dict[str, Any]) -> None:
    with pytest.raises(BadConfig, match=r"^mm_processor_kwargs"):
        parse_processor_kwargs(area)


def test_config_is_a_value_that_does_not_change() -> None:
    config = EngineConfig("darkroom-tiny")

    with pytest.raises(AttributeError):
        config.model = "other"  # type: ignore[misc]
    assert "darkroom-tiny" == Path(config.folder_or_id).name
    assert "other/model" == EngineConfig("other/model").folder_or_id
