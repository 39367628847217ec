"""
Qwen2.5-VL and Qwen3-VL against transformers: sizes, patches, windows, positions and answers.

Each with two shapes of tiny random weights, float32 on a CPU.
"""

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
)
from transformers import Qwen2VLImageProcessorPil as Processor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize
from transformers.video_utils import VideoMetadata
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_window_index,
)

from bench.configs import write_shape
from bench.later_qwen import LaterQwenShape
from engine import LLM
from engine.errors import BadConfig
from engine.families import find_entry
from engine.families.protocol import AreaLimits, Description, ImageTooNarrowError, Plan
from engine.families.qwen2_5_vl import find_windows
from engine.families.qwen2_vl import MERGE, Grid, Qwen2VL, cut_on_device
from engine.families.qwen3_vl import clip_size, find_taps
from engine.kernels import folded, rotated, split
from engine.kernels.pictures import Choice, Cut
from engine.reference import Reference
from media.decoded import Frames
from tests.engine.families import NUM_ASKED
from tests.engine.mixed import ANSWER, CLIP, PICTURE, SYSTEM, mixed_requests
from tests.engine.pictures import GREEDY, as_frames, draw, draw_clip, features_of, token_ids
from tests.engine.test_exactness import check_all_ways
from tests.engine.test_repeats import Runs, visuals_of
from tests.engine.tiny_qwen import (
    QWEN2_5_VL,
    QWEN2_5_VL_OTHER,
    QWEN3_VL,
    QWEN3_VL_OTHER,
    write_tiny_qwen,
)

NUM_REQUESTS = NUM_ASKED or 14
# 5.17 cuts the seconds of a pair of frames to whole ones.
HAS_SECONDS = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 18)
TOLERANCE = 1e-6  # of a channel that runs from 0 to 1

CASES = {
    "2.5": QWEN2_5_VL,
    "2.5 other": QWEN2_5_VL_OTHER,
    "3": QWEN3_VL,
    "3 other": QWEN3_VL_OTHER,
}


@pytest.fixture(scope="module", params=list(CASES.values()), ids=list(CASES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen(tmp_path_factory.mktemp("tiny"), request.param, seed=3)


@pytest.fixture(scope="module")
def family(folder: Path) -> Qwen2VL:
    """Without weights."""
    written = json.loads((folder / "config.json").read_text())
    entry = find_entry(written)
    assert entry is not None
    parts = [folder / f"{part}preprocessor_config.json" for part in ("", "video_")]
    pictures, clips = (json.loads(part.read_text()) if part.exists() else {} for part in parts)
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    built = entry.load_family()(Description(config, tokenizer, pictures, clips))
    assert isinstance(built, Qwen2VL)
    return built


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    llm = LLM(str(folder), limit_mm_per_prompt={"image": 8}, max_num_seqs=24)
    yield llm
    llm.close()


@pytest.mark.timeout(900)
def test_random_weights_answer_as_the_reference_in_any_order(folder: Path, llm: LLM) -> None:
    asked = mixed_requests(NUM_REQUESTS, "later qwen", with_times=HAS_SECONDS)

    assert any(mixed.videos for mixed in asked)
    check_all_ways(llm, Reference(folder), asked, ignore_eos=True)


def test_norms_left_to_products_and_products_in_parts_leave_answers_as_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first layers' results have something added (deepstack)."""
    monkeypatch.setattr(rotated, "choose", lambda *_: 10**6)
    monkeypatch.setattr(folded, "choose", lambda *_, **__: 20)
    monkeypatch.setattr(split, "choose", lambda *_, **__: split.Span(1, 19))
    asked = mixed_requests(6, "folded", with_times=HAS_SECONDS)
    llm = LLM(str(folder), limit_mm_per_prompt={"image": 8}, max_num_seqs=24)

    with contextlib.closing(llm):
        check_all_ways(llm, Reference(folder), asked, ignore_eos=True)


def test_features_answer_in_the_place_of_their_picture(llm: LLM) -> None:
    prompt = f"{SYSTEM}{PICTURE}What is there?{ANSWER}"
    picture = draw(3, 150, 90)
    (features,), (grid,) = features_of(llm, picture)
    embeds = {"image_embeds": features, "image_grid_thw": torch.tensor([grid])}

    given = [
        {"prompt": prompt, "multi_modal_data": {"image": image}} for image in (picture, embeds)
    ]
    seen, made = token_ids(llm.generate(given, GREEDY, use_tqdm=False))

    assert seen == made
    assert features.shape[1] == llm.engine.checkpoint.family.feature_size


def test_filled_up_calls_give_the_same_features(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    family = llm.engine.checkpoint.family
    assert isinstance(family, Qwen2VL)
    visuals = visuals_of(family, [(56, 84), (112, 56), (230, 84), (84, 84)])
    expected = family.encode(visuals)

    choice = Choice(Cut(), beats_dense=True, windows=Cut())  # its twin, here
    monkeypatch.setattr(family.encoder, "choice", choice)
    monkeypatch.setattr(family.encoder, "has_varlen", True)
    runs = Runs()
    monkeypatch.setattr(family, "repeats", runs)
    found = family.encode(visuals)
    family.encode(visuals_of(family, [(84, 56), (56, 112), (230, 84), (84, 84)]))

    assert 1 == len(set(runs.keys))  # other sizes, one graph
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_text_layers_that_look_back_over_a_window(tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    shape = replace(QWEN2_5_VL_OTHER, text={**QWEN2_5_VL_OTHER.text, **windows})
    folder = write_tiny_qwen(tmp_path, shape, seed=3)
    reference = Reference(folder)
    asked = mixed_requests(6, "windows")
    with LLM(str(folder), limit_mm_per_prompt={"image": 8}) as llm:
        results = list(llm.stream([mixed.request(ignore_eos=True) for mixed in asked]))
    found = {result.request_id: list(result.outputs[0].token_ids) for result in results}

    assert "sliding_attention" in reference.model.config.text_config.layer_types
    assert {mixed.name: mixed.ask(reference, ignore_eos=True) for mixed in asked} == found


@pytest.mark.parametrize("frame_s", [600.0, 1e300])
def test_clip_that_outlasts_all_positions_ends_alone(tmp_path: Path, frame_s: float) -> None:
    frames = as_frames(draw_clip(1, 6))
    prompt = f"{CLIP}a"
    clips = [
        replace(frames, times_s=tuple(step * index for index in range(6)))
        for step in (1.0, frame_s)
    ]
    with LLM(str(write_tiny_qwen(tmp_path, QWEN2_5_VL_OTHER))) as llm:
        good, bad = llm.generate(
            [{"prompt": prompt, "multi_modal_data": {"video": clip}} for clip in clips],
            GREEDY,
            use_tqdm=False,
        )

    assert good.error is None
    assert bad.error is not None
    assert "lasts longer than to the last of the model's 4096 positions" in bad.error.message


def test_positions_that_change_with_the_length_are_refused(tmp_path: Path) -> None:
    rope = {**QWEN3_VL.text["rope_parameters"], "rope_type": "dynamic", "factor": 2.0}
    shape = replace(QWEN3_VL, text={**QWEN3_VL.text, "rope_parameters": rope})

    with pytest.raises(BadConfig, match="positions are of the type 'dynamic'"):
        LLM(str(write_shape(shape, tmp_path)))


# --- from sizes to patches ---------------------------------------------------------------------------


def test_100_pictures_equal_the_pil_processor_pixel_for_pixel(
    folder: Path, family: Qwen2VL
) -> None:
    processor = Processor.from_pretrained(folder)
    mean, std = (np.array(x)[:, None] for x in (processor.image_mean, processor.image_std))
    rng = random.Random(1)
    for seed in range(100):
        width_px, height_px = rng.randint(1, 300), rng.randint(20, 300)
        if rng.random() < 0.2:
            width_px = height_px * rng.choice((3, 7, 150))
        picture = draw(seed, min(width_px, 200 * height_px), height_px)
        plan = family.plan_picture(*picture.size, None)
        frames = family.cut_picture(picture, plan).pixels
        patches = cut_on_device(frames, is_clip=False, patch_px=family.patch_px).numpy()

        cut = processor([picture], return_tensors="np")
        expected = cut["pixel_values"].reshape(len(patches), 3, 2, -1)
        for frame in (0, 1):  # of a still picture they are equal
            wanted = expected[:, :, frame] * std + mean
            difference = np.abs(wanted - patches.reshape(wanted.shape) / 255)
            assert difference.max() <= TOLERANCE
        num_patches = processor.get_number_of_image_patches(*picture.size[::-1])
        assert cut["image_grid_thw"][0].tolist()[1:] == [plan.layout.rows, plan.layout.columns]
        assert num_patches // MERGE**2 == plan.num_tokens == plan.num_rows


def test_clips_equal_the_references_frame_by_frame(folder: Path, family: Qwen2VL) -> None:
    reference = Reference(folder)
    for num_frames, size in ((1, (90, 60)), (2, (300, 40)), (5, (33, 77)), (8, (120, 120))):
        images = draw_clip(num_frames, num_frames, *size)
        plan = family.plan_clip(*size, num_frames, None, None, None, None)
        frames = family.cut_clip(images, plan).pixels
        patches = cut_on_device(frames, is_clip=True, patch_px=family.patch_px)

        given = reference.encode("<|video_pad|>", videos=[as_frames(images)])
        mean, std = reference.image_processor.image_mean, reference.image_processor.image_std
        scale = torch.tensor([mean, std])[..., None]
        expected = given["pixel_values_videos"].view(len(patches), 3, -1) * scale[1] + scale[0]
        torch.testing.assert_close(
            patches.view(expected.shape) / 255, expected, rtol=0, atol=TOLERANCE
        )
        assert given["input_ids"][0].tolist() == plan.token_ids()


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_clip_stands_in_the_prompt_as_transformers_writes_it(llm: LLM, num_frames: int) -> None:
    """Its processor cannot be made without torchvision; what writes the text can be asked alone."""
    family = llm.engine.checkpoint.family
    step, fps = 13, 29.97
    indices = list(range(0, num_frames * step, step))
    images = as_frames(draw_clip(7, num_frames, 120, 80)).images
    times_s = tuple(index / fps for index in indices)
    clip = Frames(images, times_s, fps, num_frames * step, tuple(indices))
    plan = family.plan_clip(120, 80, num_frames, times_s, clip.frame_s, None, None)
    told = {
        "video_grid_thw": np.array([[plan.layout.times, plan.layout.rows, plan.layout.columns]]),
        "video_metadata": [VideoMetadata(num_frames * step, fps=fps, frames_indices=indices)],
    }
    unbound: Any = Qwen3VLProcessor  # it reads nothing of itself there
    marks = ("vision_start", "<|vision_start|>"), ("video", "<|video_pad|>")
    processor = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        _calculate_timestamps=partial(unbound._calculate_timestamps, None),
        **{f"{name}_token": mark for name, mark in (*marks, ("vision_end", "<|vision_end|>"))},
    )
    model_type = llm.engine.checkpoint.config.model_type
    written: Any = Qwen3VLProcessor if model_type == "qwen3_vl" else Qwen2_5_VLProcessor
    expanded = written.replace_video_token(processor, told, 0)

    prompt = f"{SYSTEM}{CLIP}What happens?{ANSWER}"
    given = {"prompt": prompt, "multi_modal_data": {"video": clip}}
    (result,) = llm.generate(given, GREEDY, use_tqdm=False)
    whole = prompt.replace("<|video_pad|>", expanded)

    assert llm.engine.checkpoint.tokenizer(whole)["input_ids"] == result.prompt_token_ids


# --- positions ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(folder: Path) -> Any:
    """A model without weights: `get_rope_index` reads its config only."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        whole: Any = AutoModelForImageTextToText.from_config(config)  # type: ignore[no-untyped-call]
    return whole.model


@pytest.mark.parametrize("seed", range(30))
def test_positions_of_mixed_prompts_are_transformers(
    family: Qwen2VL, published: Any, seed: int
) -> None:
    rng = random.Random(seed)
    ids, media, kinds = [1] * rng.randint(0, 9), [], []
    clips: list[Frames] = []
    for _ in range(rng.randint(1, 5)):
        size = rng.randint(30, 300), rng.randint(30, 300)
        if rng.random() < 0.5:
            plan = family.plan_picture(*size, None)
        else:
            clips.append(_clip(rng))
            clip = clips[-1]
            plan = family.plan_clip(*size, clip.num_frames, clip.times_s, clip.frame_s, None, None)
        kinds.append((plan, family.video_token_id in plan.token_ids()))
        media.append((len(ids), plan))
        ids += plan.token_ids() + [1] * rng.randint(1, 9)

    positions, delta = family.positions(len(ids), media)
    expected = _rope_index(family, published, ids, kinds, clips)

    np.testing.assert_array_equal(expected, positions)
    assert positions[0, -1] + 1 == len(ids) + delta


def _clip(rng: random.Random) -> Frames:
    num_frames = rng.randint(1, 9)
    images = tuple(as_frames([Image.new("RGB", (4, 4))] * num_frames).images)
    if not HAS_SECONDS or rng.random() < 0.3:
        return Frames(images)
    fps, step = rng.choice((10.0, 23.976, 30.0)), rng.randint(1, 50)
    indices = tuple(range(0, num_frames * step, step))
    times_s = tuple(index / fps for index in indices)
    return Frames(images, times_s, fps, indices[-1] + 1, indices)


def _rope_index(
    family: Qwen2VL,
    model: Any,
    ids: list[int],
    kinds: list[tuple[Plan, bool]],
    clips: list[Frames],
) -> npt.NDArray[Any]:
    types = torch.zeros(1, len(ids), dtype=torch.int64)
    for kind, token_id in ((1, family.image_token_id), (2, family.video_token_id)):
        types[torch.tensor([ids]) == token_id] = kind
    by_kind = {
        is_clip: [
            [plan.layout.times, plan.layout.rows, plan.layout.columns]
            for plan, kind in kinds
            if kind == is_clip
        ]
        for is_clip in (False, True)
    }
    seconds = [
        2 / (clip.num_frames / clip.source_num_frames * clip.fps)
        if clip.fps and clip.source_num_frames
        else 1.0
        for clip in clips
    ]
    positions, _ = model.get_rope_index(
        torch.tensor([ids]),
        mm_token_type_ids=types,
        image_grid_thw=torch.tensor(by_kind[False]) if by_kind[False] else None,
        video_grid_thw=torch.tensor(by_kind[True]) if by_kind[True] else None,
        second_per_grid_ts=torch.tensor(seconds) if seconds else None,
        attention_mask=torch.ones_like(types),
    )
    found: npt.NDArray[Any] = positions[:, 0].numpy()
    return found


# --- windows, learned positions, sizes of clips -------------------------------------------------------


grids = st.builds(
    lambda times, rows, columns: Grid(times, rows * MERGE, columns * MERGE),
    st.integers(1, 4),
    st.integers(1, 20),
    st.integers(1, 20),
)


@given(grid=grids, window=st.integers(1, 9))
def test_windows_are_transformers(grid: Grid, window: int) -> None:
    expected = get_vision_window_index(
        torch.tensor([[grid.times, grid.rows, grid.columns]]), MERGE, window * MERGE * 14, 14
    )
    order, sizes = find_windows(grid, window)

    np.testing.assert_array_equal(expected[0].numpy(), order)
    np.testing.assert_array_equal(expected[1].diff().numpy(), sizes)


@given(grid=grids, side=st.integers(2, 48))
def test_positions_between_entries_are_transformers(grid: Grid, side: int) -> None:
    expected = get_vision_interpolation_indices_and_weights(
        torch.tensor([[grid.times, grid.rows, grid.columns]]),
        num_grid_per_side=side,
        mode="bilinear",
        align_corners=True,
        spatial_merge_size=MERGE,
    )

    for theirs, ours in zip(expected, find_taps(grid, side), strict=True):
        np.testing.assert_array_equal(theirs.numpy(), ours)


@given(
    num_frames=st.integers(2, 40),
    height_px=st.integers(1, 2000),
    width_px=st.integers(1, 2000),
    least=st.integers(1, 200),
    factor=st.integers(4, 900),
)
def test_size_of_a_clip_is_the_published_one(
    num_frames: int, height_px: int, width_px: int, least: int, factor: int
) -> None:
    area = AreaLimits(least * 1024, least * factor * 1024)
    try:
        expected = smart_resize(
            num_frames, height_px, width_px, 2, 32, area.min_pixels, area.max_pixels
        )
    except ValueError:
        with pytest.raises(ImageTooNarrowError):
            clip_size(num_frames, height_px, width_px, area, 32)
    else:
        assert expected == clip_size(num_frames, height_px, width_px, area, 32)


# --- configs as they are published -------------------------------------------------------------------


def flatten(config: dict[str, Any]) -> None:
    """The text's config on top, and its positions as `rope_scaling`, as Qwen2.5-VL's authors write it."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    config |= {name: value for name, value in text.items() if name != "model_type"}
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config |= {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 70}
    config["vision_config"].pop("model_type")


def rename(config: dict[str, Any]) -> None:
    """As Qwen3-VL's authors write it: an older name of its encoder, and positions as `rope_scaling`."""
    config["vision_config"]["model_type"] = "qwen3_vl"
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope


@pytest.mark.parametrize(("shape", "change"), [(QWEN2_5_VL, flatten), (QWEN3_VL, rename)])
def test_configs_as_their_authors_write_them(
    tmp_path: Path, shape: LaterQwenShape, change: Callable[[dict[str, Any]], None]
) -> None:
    folder = write_tiny_qwen(tmp_path, shape, seed=3)
    expected = answer(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))

    assert expected == answer(folder)


def answer(folder: Path) -> list[list[int]]:
    prompt = f"{SYSTEM}{PICTURE}What is there?{ANSWER}"
    given = {"prompt": prompt, "multi_modal_data": {"image": draw(3, 150, 90)}}
    with LLM(str(folder)) as llm:
        return token_ids(llm.generate(given, GREEDY, use_tqdm=False))
