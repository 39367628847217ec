"""Qwen2-VL's arithmetic of sizes, patches and positions, against transformers and by definition."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.vision_utils import get_vision_position_ids

from engine import LLM
from engine.checkpoint import read_checkpoint
from engine.config import EngineConfig
from engine.errors import BadConfig
from engine.families.protocol import AreaLimits, Description, ImageTooNarrowError, Plan, Rows
from engine.families.qwen2_vl import (
    MERGE,
    TOKEN_PX,
    Grid,
    Qwen2VL,
    cut_on_device,
    cut_patches,
    double_frames,
    next_position,
    pair_frames,
    patch_positions,
    resample,
    target_size,
    token_positions,
)
from engine.reference import Reference
from tests.engine.pictures import cut_picture, draw
from tests.engine.tiny import write_tiny_qwen2_vl

TEXT, IMAGE, VIDEO = 0, 1, 2  # as in transformers' mm_token_type_ids

sides = st.integers(1, 8000) | st.integers(1, 60)
areas = st.builds(
    lambda least, factor: AreaLimits(least * TOKEN_PX**2, least * factor * TOKEN_PX**2),
    st.integers(1, 400),
    st.integers(4, 60),
)
grids = st.builds(
    lambda times, rows, columns: Grid(times, rows * MERGE, columns * MERGE),
    st.integers(1, 12),
    st.integers(1, 7),
    st.integers(1, 7),
)


@given(height_px=sides, width_px=sides, area=areas)
def test_target_size_is_the_published_one(height_px: int, width_px: int, area: AreaLimits) -> None:
    assume(max(height_px, width_px) <= 200 * min(height_px, width_px))

    assert target_size(height_px, width_px, area) == smart_resize(
        height_px, width_px, TOKEN_PX, area.min_pixels, area.max_pixels
    )


@given(height_px=sides, width_px=sides, area=areas)
def test_target_size_is_whole_tokens_within_the_limits(
    height_px: int, width_px: int, area: AreaLimits
) -> None:
    assume(max(height_px, width_px) <= 200 * min(height_px, width_px))
    height, width = target_size(height_px, width_px, area)

    assert 0 == height % TOKEN_PX == width % TOKEN_PX
    assert TOKEN_PX <= min(height, width)
    # A strip of one token is never made thinner, whatever the area.
    assert area.min_pixels <= height * width <= area.max_pixels or TOKEN_PX in (height, width)


@given(height_px=sides, width_px=sides, area=areas)
def test_target_size_of_a_target_is_itself(height_px: int, width_px: int, area: AreaLimits) -> None:
    assume(max(height_px, width_px) <= 200 * min(height_px, width_px))
    height, width = target_size(height_px, width_px, area)
    assume(area.min_pixels <= height * width <= area.max_pixels)
    assume(max(height, width) <= 200 * min(height, width))  # rounding can make a strip too narrow

    assert (height, width) == target_size(height, width, area)


@given(height_px=sides, width_px=sides, area=areas)
def test_target_size_of_a_picture_on_its_side_is_on_its_side(
    height_px: int, width_px: int, area: AreaLimits
) -> None:
    assume(max(height_px, width_px) <= 200 * min(height_px, width_px))

    assert target_size(height_px, width_px, area) == target_size(width_px, height_px, area)[::-1]


@given(shorter=st.integers(1, 400), over=st.integers(1, 10_000))
def test_more_than_200_to_1_is_too_narrow(shorter: int, over: int) -> None:
    for size in ((shorter, 200 * shorter + over), (200 * shorter + over, shorter)):
        with pytest.raises(ImageTooNarrowError):
            target_size(*size, AreaLimits())


def test_picture_of_the_right_size_is_not_resampled() -> None:
    picture = Image.new("RGB", (56, 84))

    assert resample(picture, 84, 56) is picture
    assert (56, 28) == resample(picture, 28, 56).size


def random_pixels(height_px: int, width_px: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)


def cut_by_definition(frames: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """
    What a vision encoder of Qwen2-VL reads, piece by piece.

    A patch is the same 14 x 14 pixels of neighbouring frames, channel by channel; the four patches
    of a token follow each other, then the tokens of a row, the rows, and the pairs of frames.
    """
    video = np.stack(frames)
    height_px, width_px = video.shape[1:3]
    return np.stack(
        [
            video[time : time + 2, y : y + 14, x : x + 14].transpose(3, 0, 1, 2).ravel()
            for time in range(0, len(video), 2)
            for top in range(0, height_px, 28)
            for left in range(0, width_px, 28)
            for y in (top, top + 14)
            for x in (left, left + 14)
        ]
    )


@pytest.mark.parametrize(("height_px", "width_px"), [(28, 28), (56, 112), (140, 28), (84, 252)])
def test_picture_is_cut_as_a_clip_of_two_equal_frames(height_px: int, width_px: int) -> None:
    pixels = random_pixels(height_px, width_px)
    patches = cut_patches(pixels)

    assert (height_px * width_px // 14**2, 3 * 14**2) == patches.shape
    assert np.uint8 == patches.dtype
    np.testing.assert_array_equal(cut_by_definition([pixels, pixels]), double_frames(patches))
    np.testing.assert_array_equal(pair_frames([patches, patches]), double_frames(patches))


@pytest.mark.parametrize("num_frames", [1, 2, 3, 6, 7])
def test_frames_are_paired_in_order_and_an_odd_last_one_is_doubled(num_frames: int) -> None:
    frames = [random_pixels(56, 84, seed) for seed in range(num_frames)]
    paired = pair_frames([cut_patches(frame) for frame in frames])

    even = frames + frames[-1:] * (num_frames % 2)
    assert (len(even) // 2 * 4 * 6, 2 * 3 * 14**2) == paired.shape
    assert np.uint8 == paired.dtype
    np.testing.assert_array_equal(cut_by_definition(even), paired)


@given(grid=grids)
def test_patch_positions_are_the_encoders(grid: Grid) -> None:
    expected = get_vision_position_ids(
        torch.tensor([[grid.times, grid.rows, grid.columns]]), spatial_merge_size=MERGE
    )

    np.testing.assert_array_equal(expected.numpy(), patch_positions(grid))


def test_patch_positions_stand_where_the_patches_were_cut() -> None:
    rows, columns = np.indices((56, 84)) // 14
    pixels = np.stack([rows, columns, rows], axis=-1).astype(np.uint8)
    patches = cut_patches(pixels).reshape(-1, 3, 14**2)

    np.testing.assert_array_equal(patches[:, :2, 0], patch_positions(Grid(1, 4, 6)))


@dataclass(frozen=True, slots=True)
class Span:
    """A run of text tokens, or the placeholders of one picture or clip."""

    kind: int
    grid: Grid
    num_text_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_text_tokens if self.kind == TEXT else self.grid.num_tokens


def text_of(num_tokens: int) -> Span:
    return Span(TEXT, Grid(0, 0, 0), num_tokens)


@st.composite
def prompts(draw: st.DrawFn) -> list[Span]:
    """Pictures and clips, with text around each: the marks of a picture are text too."""

    spans = [text_of(draw(st.integers(1, 20)))]
    for kind in draw(st.lists(st.sampled_from((IMAGE, VIDEO)), max_size=5)):
        grid = draw(grids)
        spans.append(Span(kind, grid if kind == VIDEO else Grid(1, grid.rows, grid.columns)))
        spans.append(text_of(draw(st.integers(1, 20))))
    return spans


def walk(prompt: list[Span]) -> tuple[npt.NDArray[np.int64], int]:
    """The positions of a whole prompt by our functions, and that of the token after it."""
    positions, at = [], 0
    for span in prompt:
        if span.kind == TEXT:
            positions.append(np.tile(np.arange(at, at + span.num_tokens), (3, 1)))
            at += span.num_tokens
        else:
            positions.append(token_positions(span.grid, at))
            at = next_position(span.grid, at)
    return np.concatenate(positions, axis=1), at


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Qwen2VLModel:
    """A model without weights: `get_rope_index` reads its config only."""
    folder: Path = write_tiny_qwen2_vl(tmp_path_factory.mktemp("tiny"))
    with torch.device("meta"):
        return Qwen2VLModel(AutoConfig.from_pretrained(folder))


def rope_index(model: Qwen2VLModel, prompt: list[Span]) -> npt.NDArray[Any]:
    # Any: transformers' hints ask for LongTensor and IntTensor, which no function of torch returns.
    types: Any = torch.tensor([[span.kind for span in prompt for _ in range(span.num_tokens)]])
    by_kind: dict[int, Any] = {
        kind: torch.tensor(
            [[s.grid.times, s.grid.rows, s.grid.columns] for s in prompt if s.kind == kind]
        )
        for kind in (IMAGE, VIDEO)
    }
    positions, _ = model.get_rope_index(
        types,  # the ids themselves do not matter
        mm_token_type_ids=types,
        image_grid_thw=by_kind[IMAGE],
        video_grid_thw=by_kind[VIDEO],
        attention_mask=torch.ones_like(types),
    )
    expected: npt.NDArray[Any] = positions[:, 0].numpy()
    return expected


@given(prompt=prompts())
def test_positions_of_mixed_prompts_are_transformers(
    published: Qwen2VLModel, prompt: list[Span]
) -> None:
    expected = rope_index(published, prompt)
    positions, following = walk(prompt)

    np.testing.assert_array_equal(expected, positions)
    # `generate` goes on from the prompt's last token; tests/engine/test_reference.py watches it.
    assert (expected[:, -1] + 1).tolist() == [following] * 3


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Qwen2VL:
    folder: Path = write_tiny_qwen2_vl(tmp_path_factory.mktemp("tiny"))
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    return Qwen2VL(Description(AutoConfig.from_pretrained(folder), None, processor))


def media_of(prompt: list[Span]) -> list[tuple[int, Plan]]:
    starts = np.cumsum([0, *(span.num_tokens for span in prompt)])
    return [
        (int(start), Plan((Rows(0, span.num_tokens),), layout=span.grid))
        for start, span in zip(starts, prompt, strict=False)
        if span.kind != TEXT
    ]


@given(prompt=prompts())
def test_positions_of_a_prompt_are_those_of_its_parts(family: Qwen2VL, prompt: list[Span]) -> None:
    expected, _ = walk(prompt)
    positions, _ = family.positions(expected.shape[1], media_of(prompt))

    np.testing.assert_array_equal(expected, positions)


@pytest.mark.parametrize(
    "times",
    [
        2,
        30,
    ],
)
def test_answer_goes_on_after_the_last_word(family: Qwen2VL, times: int) -> None:
    """tests/engine/test_reference.py watches `generate` do so; its `rope_deltas` say otherwise."""
    prompt = [text_of(5), Span(VIDEO, Grid(times, 4, 6)), text_of(2)]
    num_tokens = sum(span.num_tokens for span in prompt)
    positions, delta = family.positions(num_tokens, media_of(prompt))

    assert positions[0, -1] + 1 == num_tokens + delta


def test_moments_of_a_long_clip_do_not_push_the_text_back(published: Qwen2VLModel) -> None:
    clip = Span(VIDEO, Grid(30, 4, 6))
    prompt = [text_of(5), clip, text_of(2)]
    positions, following = walk(prompt)

    assert 5 + 3 == next_position(clip.grid, 5) == positions[0, -2]
    assert 5 + 29 == positions.max()
    assert 10 == following
    np.testing.assert_array_equal(rope_index(published, prompt), positions)


PUBLISHED_READING: dict[str, object] = {
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_normalize": True,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
}


def read_with(folder: Path, name: str, **words: object) -> None:
    """Read a tiny checkpoint, one of whose files says this too."""
    write_tiny_qwen2_vl(folder)
    path = folder / name
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(said | words))
    read_checkpoint(EngineConfig(str(folder), device="cpu"))


@pytest.mark.parametrize("name", ["preprocessor_config.json", "video_preprocessor_config.json"])
def test_processor_that_reads_in_another_way_is_refused(tmp_path: Path, name: str) -> None:
    others: dict[str, object] = {
        "do_resize": False,
        "resample": 2,
        "do_rescale": False,
        "rescale_factor": 1.0,
        "do_normalize": False,
        "patch_size": 16,
        "merge_size": 1,
        "temporal_patch_size": 1,
    }

    read_with(tmp_path, name, **PUBLISHED_READING)
    for word, value in others.items():
        with pytest.raises(BadConfig, match=f"{name} says {word}={value}, where "):
            read_with(tmp_path, name, **PUBLISHED_READING | {word: value})


def test_clips_of_other_colours_than_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="says another image_std than its preprocessor_config"):
        read_with(tmp_path, "video_preprocessor_config.json", image_std=[0.5] * 3)


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_loses_no_more_than_transformers_loses(tmp_path: Path, seed: int) -> None:
    folder = write_tiny_qwen2_vl(tmp_path / "tiny", seed=seed)
    exact, theirs = Reference(folder), Reference(folder, dtype=torch.bfloat16)
    family = LLM(str(folder), dtype="bfloat16").engine.checkpoint.family
    grey = np.random.default_rng(seed).normal(128, 12, (112, 112, 3)).astype(np.uint8)
    pictures = [draw(seed, 112, 112), Image.fromarray(grey), Image.new("RGB", (112, 112), "white")]
    their_error = our_error = 0.0
    for picture in pictures:
        expected = features_by(exact, picture)
        ours = family.encode([cut_picture(family, picture)])[0].double()
        their_error += float((features_by(theirs, picture) - expected).square().mean())
        our_error += float((ours - expected).square().mean())

    assert their_error > 0
    assert our_error**0.5 <= 1.2 * their_error**0.5


@torch.inference_mode()
def features_by(reference: Reference, picture: Image.Image) -> torch.Tensor:
    """(num_tokens, hidden), float64: what transformers' own processor and encoder make of it."""
    cut = reference.image_processor([picture], size=reference.image_size, return_tensors="pt")
    visual = reference.model.model.visual
    pixels = cut["pixel_values"].to(reference.model.dtype)
    features: torch.Tensor = visual(pixels, grid_thw=cut["image_grid_thw"]).pooler_output
    return features.double()


def test_cutting_where_the_encoder_runs_is_cutting_on_the_host() -> None:
    generator = np.random.default_rng(3)
    frames = generator.integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)
    by_frame = [cut_patches(frame) for frame in frames]

    stills = cut_on_device(torch.from_numpy(frames), is_clip=False)
    clip = cut_on_device(torch.from_numpy(frames), is_clip=True)

    np.testing.assert_array_equal(np.concatenate(by_frame), stills.numpy())
    np.testing.assert_array_equal(pair_frames(by_frame), clip.numpy())
