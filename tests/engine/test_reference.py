"""The oracle itself: what it must notice, and that it shares nothing with what it judges."""

import ast
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

import engine.reference
from engine.reference import Reference
from media.decoded import Frames, RGBImage
from tests.engine.tiny import ALL_KV_HEADS, ONE_KV_HEAD, Shape, write_tiny_qwen2_vl

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
SHAPES: dict[str, Shape] = {
    "default": {},
    "one KV head": ONE_KV_HEAD,
    "all KV heads": ALL_KV_HEADS,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Where cores are busy, threads wait for each other longer than so small a model computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(write_tiny_qwen2_vl(tmp_path_factory.mktemp("tiny"), seed=1))


def draw(seed: int, width_px: int, height_px: int) -> RGBImage:
    """A picture of large blurred blocks of random colours."""
    shape = (height_px // 16 + 1, width_px // 16 + 1, 3)
    blocks = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return RGBImage(Image.fromarray(blocks).resize((width_px, height_px)))


def draw_clip(seed: int, num_frames: int) -> Frames:
    return Frames(tuple(draw(1000 * seed + index, 60, 84) for index in range(num_frames)))


def test_tiny_checkpoint_is_its_seed_and_its_shape(tmp_path: Path) -> None:
    def weights(name: str, seed: int, **shape: Unpack[Shape]) -> bytes:
        folder = write_tiny_qwen2_vl(tmp_path / name, seed=seed, **shape)
        return (folder / "model.safetensors").read_bytes()

    assert weights("one", 1) == weights("again", 1)
    assert weights("one", 1) != weights("other seed", 2)
    assert weights("one", 1) != weights("other shape", 1, **ONE_KV_HEAD)


def test_same_prompt_gives_same_tokens_whatever_came_between(reference: Reference) -> None:
    picture = draw(1, 112, 84)
    first = reference.generate(IMAGE + "What is it?", images=[picture], max_tokens=12)
    reference.generate(VIDEO + "And this?", videos=[draw_clip(2, 5)], max_tokens=3)
    reference.generate("No picture.", max_tokens=3)

    assert first == reference.generate(IMAGE + "What is it?", images=[picture], max_tokens=12)


def test_what_a_picture_shows_changes_the_answer(reference: Reference) -> None:
    answers = {
        tuple(reference.generate(IMAGE + "?", images=[draw(seed, 84, 84)], max_tokens=8))
        for seed in range(8)
    }

    assert 8 == len(answers)


def test_words_change_the_answer(reference: Reference) -> None:
    words = ["a", "b", "Describe.", "Describe!", "one two", "two one"]

    assert len(words) == len({tuple(reference.generate(w, max_tokens=8)) for w in words})


def test_order_of_pictures_and_of_frames_changes_the_answer(reference: Reference) -> None:
    one, other = draw(1, 84, 84), draw(2, 84, 84)
    clip = draw_clip(3, 6)
    backwards = Frames(clip.images[::-1])

    def answers(images: list[RGBImage], clip: Frames) -> tuple[list[int], list[int]]:
        return (
            reference.generate(IMAGE * 2 + "?", images=images, max_tokens=8),
            reference.generate(VIDEO + "?", videos=[clip], max_tokens=8),
        )

    for forth, back in zip(
        answers([one, other], clip), answers([other, one], backwards), strict=True
    ):
        assert forth != back


def test_text_and_its_token_ids_are_one_prompt(reference: Reference) -> None:
    prompt = f"Look: {IMAGE} and {IMAGE}."
    images = [draw(1, 60, 60), draw(2, 90, 60)]
    ids: list[int] = reference.tokenizer(prompt)["input_ids"]

    assert reference.generate(prompt, images=images, max_tokens=6) == reference.generate(
        ids, images=images, max_tokens=6
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logprobs_of_its_own_answer_are_highest_at_its_tokens(tmp_path: Path, shape: Shape) -> None:
    reference = Reference(write_tiny_qwen2_vl(tmp_path, seed=2, **shape))
    cases: list[tuple[str, list[RGBImage], list[Frames]]] = [
        ("Only words.", [], []),
        (IMAGE + "One picture.", [draw(1, 100, 70)], []),
        (f"{IMAGE}a{IMAGE}b", [draw(2, 56, 56), draw(3, 150, 60)], []),
        # Longer than it is wide: its latest moment lies behind the words that follow it.
        (VIDEO + "A clip.", [], [draw_clip(4, 25)]),
        (IMAGE + VIDEO + "Both.", [draw(5, 70, 70)], [draw_clip(5, 3)]),
    ]

    for prompt, images, videos in cases:
        ids = reference.generate(
            prompt, images=images, videos=videos, max_tokens=16, ignore_eos=True
        )
        logprobs = reference.logprobs(prompt, images, videos, ids)
        assert ids == logprobs.argmax(-1).tolist()
        assert (16, 272) == logprobs.shape
        torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(16))


def test_logprobs_judge_an_answer_with_placeholders_in_it(reference: Reference) -> None:
    placeholder: int = reference.model.config.image_token_id
    picture = [draw(1, 84, 84)]

    plain = reference.logprobs(IMAGE + "?", picture, [], [65, 66, 67])
    other = reference.logprobs(IMAGE + "?", picture, [], [65, placeholder, 67])

    torch.testing.assert_close(plain[:2], other[:2])
    assert not torch.allclose(plain[2], other[2])


def test_answer_ends_with_the_first_eos_unless_told_otherwise(reference: Reference) -> None:
    whole = reference.generate("Go on.", max_tokens=12, ignore_eos=True)
    ends, reference.eos_ids = reference.eos_ids, [whole[5], 100_000]
    try:
        cut = reference.generate("Go on.", max_tokens=12)
        uncut = reference.generate("Go on.", max_tokens=12, ignore_eos=True)
    finally:
        reference.eos_ids = ends

    assert whole[: whole.index(whole[5]) + 1] == cut
    assert whole == uncut
    assert whole[:7] == reference.generate("Go on.", max_tokens=7, ignore_eos=True)


def test_checkpoint_names_both_ends(reference: Reference) -> None:
    names = reference.tokenizer.convert_ids_to_tokens(reference.eos_ids)

    assert ["<|im_end|>", "<|endoftext|>"] == names


@contextmanager
def recorded_positions(reference: Reference) -> Iterator[list[npt.NDArray[np.int64]]]:
    """The positions of each call of the language model: time, row and column by tokens."""
    seen: list[npt.NDArray[np.int64]] = []

    def record(module: Any, args: Any, kwargs: dict[str, Tensor]) -> None:
        seen.append(kwargs["position_ids"][-3:, 0].numpy().copy())

    hook = reference.model.model.language_model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def test_answer_to_a_long_clip_goes_on_after_the_last_word(reference: Reference) -> None:
    """
    Not after the clip's latest moment, where transformers' `rope_deltas` would put it.

    The words after a clip start behind its longer side, so a long clip's moments overtake them.
    """
    with recorded_positions(reference) as calls:
        reference.generate(VIDEO + "?", videos=[draw_clip(1, 60)], max_tokens=3, ignore_eos=True)

    prompt, *answer = calls
    assert 1 + 29 == prompt.max()
    assert prompt[:, -1].tolist() == [1 + 3 + 1] * 3  # 84 pixels high are 3 tokens; one end mark
    assert [[6] * 3, [7] * 3] == [step[:, 0].tolist() for step in answer]


def test_clip_is_cut_into_pairs_of_frames(reference: Reference) -> None:
    clip = Frames(tuple(draw(seed, 84, 56) for seed in range(5)))
    inputs = reference.encode(VIDEO, videos=[clip])

    assert [[3, 4, 6]] == inputs["video_grid_thw"].tolist()
    assert 3 * 4 * 6 // 4 == inputs["mm_token_type_ids"].eq(2).sum()
    pixels = np.stack([*(image.pixels() for image in clip.images), clip.images[-1].pixels()])
    processor = reference.image_processor
    normalised = (pixels / 255 - processor.image_mean) / processor.image_std
    expected = torch.from_numpy(cut_by_definition(normalised)).float()
    torch.testing.assert_close(inputs["pixel_values_videos"], expected, atol=1e-5, rtol=0)


def cut_by_definition(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(frames, height_px, width_px, 3) -> patches: two frames of 14 x 14, the four of a token in a row."""
    num_frames, height_px, width_px, _ = pixels.shape
    return np.stack(
        [
            pixels[time : time + 2, y : y + 14, x : x + 14].transpose(3, 0, 1, 2).ravel()
            for time in range(0, num_frames, 2)
            for top in range(0, height_px, 28)
            for left in range(0, width_px, 28)
            for y in (top, top + 14)
            for x in (left, left + 14)
        ]
    )


def test_clip_is_cut_as_by_the_video_processor(reference: Reference) -> None:
    pytest.importorskip("torchvision")
    from transformers import Qwen2VLVideoProcessor

    clip = Frames(tuple(draw(seed, 84, 56) for seed in range(5)))
    frames = torch.from_numpy(clip.pixels()).permute(0, 3, 1, 2)
    processor = Qwen2VLVideoProcessor(size=dict(reference.video_size))
    expected = processor([frames], return_tensors="pt", do_sample_frames=False)
    inputs = reference.encode(VIDEO, videos=[clip])

    assert expected["video_grid_thw"].tolist() == inputs["video_grid_thw"].tolist()
    torch.testing.assert_close(
        inputs["pixel_values_videos"], expected["pixel_values_videos"], atol=1e-5, rtol=0
    )


def test_odd_clip_is_the_clip_with_its_last_frame_twice(reference: Reference) -> None:
    odd = draw_clip(1, 5)
    even = Frames((*odd.images, odd.images[-1]))

    assert reference.generate(VIDEO, videos=[odd], max_tokens=6) == reference.generate(
        VIDEO, videos=[even], max_tokens=6
    )


def test_size_overrides_the_checkpoint_for_pictures_and_clips(reference: Reference) -> None:
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 2}
    media: dict[str, Any] = {"images": [draw(1, 200, 100)], "videos": [draw_clip(1, 2)]}

    def tokens(**options: Any) -> list[int]:
        inputs = reference.encode(IMAGE + VIDEO, **media, **options)
        return [int(inputs["mm_token_type_ids"].eq(kind).sum()) for kind in (1, 2)]

    assert [28, 6] == tokens()
    assert [2, 1] == tokens(size=size)


@pytest.mark.parametrize(
    "written",
    [
        {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 3}},
        {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 3},
    ],
)
def test_clips_may_have_limits_of_their_own(tmp_path: Path, written: dict[str, Any]) -> None:
    write_tiny_qwen2_vl(tmp_path)
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(written))
    reference = Reference(tmp_path)
    inputs = reference.encode(IMAGE + VIDEO, [draw(1, 84, 84)], [draw_clip(1, 2)])

    assert [[1, 6, 6]] == inputs["image_grid_thw"].tolist()
    assert [[1, 4, 2]] == inputs["video_grid_thw"].tolist()


def test_placeholders_and_media_must_be_equally_many(reference: Reference) -> None:
    with pytest.raises(ValueError, match=r"1 <\|image_pad\|> for 2 media"):
        reference.generate(IMAGE, images=[draw(1, 60, 60), draw(2, 60, 60)], max_tokens=1)
    with pytest.raises(ValueError, match=r"1 <\|video_pad\|> for 0 media"):
        reference.generate(VIDEO, max_tokens=1)


def test_chat_prompt_has_a_placeholder_for_each_picture_and_clip(reference: Reference) -> None:
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Which?"}]
    prompt = reference.chat_prompt([{"role": "user", "content": content}])

    assert prompt.endswith(f"{IMAGE}{VIDEO}Which?<|im_end|>\n<|im_start|>assistant\n")


def test_reference_imports_nothing_of_the_fast_path() -> None:
    tree = ast.parse(Path(engine.reference.__file__).read_text())
    imported = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }

    assert {"media.decoded"} == {
        name for name in imported if name.startswith((".", "engine", "media"))
    }
