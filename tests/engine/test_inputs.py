"""Every form in which pictures, clips and features come in is the same picture to the model."""

import base64
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from engine import LLM, Request, Result
from engine.inputs import is_conversation, is_token_ids
from engine.request import ImageUsed
from media.errors import ImageTruncatedError
from media.images import from_pil
from tests.engine.pictures import (
    CLIP,
    GREEDY,
    PICTURE,
    as_array,
    as_frames,
    data_url,
    draw,
    draw_clip,
    encode,
    encode_base64,
    error_of,
    features_of,
    token_ids,
)

Ask = Callable[..., Result]
ORIENTATION = ExifTags.Base.Orientation


@pytest.fixture
def see(llm: LLM) -> Ask:
    """Ask about whatever stands under `image`, with a placeholder for each."""

    def ask(image: Any, num_pictures: int = 1, **options: Any) -> Result:
        prompt = {"prompt": PICTURE * num_pictures, "multi_modal_data": {"image": image}, **options}
        return llm.generate(prompt, GREEDY, use_tqdm=False)[0]

    return ask


@pytest.fixture
def watch(llm: LLM) -> Ask:
    """The same under `video`."""

    def ask(video: Any, num_clips: int = 1, **options: Any) -> Result:
        prompt = {"prompt": CLIP * num_clips, "multi_modal_data": {"video": video}, **options}
        return llm.generate(prompt, GREEDY, use_tqdm=False)[0]

    return ask


def sizes(result: Result) -> list[tuple[int, int]]:
    return [(used.used_width, used.used_height) for used in result.images]


# --- pictures ----------------------------------------------------------------------------------------


def test_every_form_of_a_picture_is_the_same_picture(see: Ask) -> None:
    image = draw(1, 120, 90)
    rows = as_array(image)
    channels = np.moveaxis(rows, -1, 0)
    forms: dict[str, Any] = {
        "PIL": image,
        "rows, columns, channels": rows,
        "channels, rows, columns": channels,
        "RGBImage": from_pil(image),
        "bytes": encode(image),
        "bytearray": bytearray(encode(image)),
        "callable": lambda: image,
        "callable with bytes": lambda: encode(image),
        "list": [image],
        "tuple": (image,),
        "4-D array": rows[None],
        "4-D array, channels first": channels[None],
        "4-D tensor": torch.from_numpy(channels[None].copy()),
        "list of a tensor, channels first": [torch.from_numpy(channels.copy())],
        "list of a tensor, channels last": [torch.from_numpy(rows.copy())],
        "dict": {"image": image},
        "list of a dict": [{"image": rows}],
    }
    results = {name: see(form) for name, form in forms.items()}
    expected = token_ids([results["PIL"]])

    assert dict.fromkeys(forms, expected) == {n: token_ids([r]) for n, r in results.items()}
    for result in results.values():
        assert [(120, 90)] == [(used.width, used.height) for used in result.images]
    assert expected != token_ids([see(draw(2, 120, 90))])


def test_pictures_of_other_modes_are_seen_as_a_person_sees_them(see: Ask) -> None:
    image = draw(3, 84, 112)
    grey = image.convert("L")
    clear = image.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    white = Image.new("RGBA", image.size, "white")
    pairs = [
        (grey, grey.convert("RGB")),
        (as_array(grey)[..., None], grey.convert("RGB")),
        (clear, Image.alpha_composite(white, clear).convert("RGB")),
        (np.asarray(clear), Image.alpha_composite(white, clear).convert("RGB")),
        (image.convert("P"), image.convert("P").convert("RGB")),
    ]

    for given, expected in pairs:
        assert token_ids([see(expected)]) == token_ids([see(given)])


def test_rotation_that_a_camera_noted_is_applied(see: Ask) -> None:
    image = draw(4, 84, 112)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # lies on its left side
    noted = Image.open(as_file(image, exif))

    assert token_ids([see(image.transpose(Image.Transpose.ROTATE_270))]) == token_ids([see(noted)])


def as_file(image: Image.Image, exif: Image.Exif) -> Any:
    file = BytesIO()
    image.save(file, "PNG", exif=exif)
    file.seek(0)
    return file


def test_many_pictures_keep_their_order(see: Ask) -> None:
    images = [draw(seed, 84, 84) for seed in range(3)]
    stacked = np.stack([as_array(image) for image in images])
    expected = token_ids([see(images, 3)])

    assert expected == token_ids([see(stacked, 3)])
    assert expected == token_ids([see(torch.from_numpy(stacked), 3)])
    assert expected == token_ids([see([images[0], stacked[1], encode(images[2])], 3)])
    assert expected != token_ids([see(images[::-1], 3)])


def test_one_file_may_be_the_picture_of_many_prompts(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder), num_media_threads=8)
    image = draw(5, 1600, 1200)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for _ in range(3):
        opened = Image.open(as_file(image, exif))  # not decoded yet, and all threads want it
        prompts = [{"prompt": PICTURE, "multi_modal_data": {"image": opened}}] * 16
        answers = token_ids(llm.generate(prompts, GREEDY, use_tqdm=False))
        turned = {"image": image.transpose(Image.Transpose.ROTATE_270)}
        expected = llm.generate({"prompt": PICTURE, "multi_modal_data": turned}, GREEDY)

        assert token_ids(expected) * 16 == answers


def test_callable_is_called_once_and_its_refusal_keeps_its_word(see: Ask) -> None:
    calls = []

    def fetch() -> Image.Image:
        calls.append(1)
        return draw(1)

    def refuse() -> Image.Image:
        raise ImageTruncatedError

    see(fetch)
    refused = see(refuse)

    assert [1] == calls
    assert refused.error is not None
    assert "image_truncated" == refused.error.code
    assert "Failed to load image: the data ends too early. Send the complete file." == error_of(
        [refused]
    )


def test_bad_picture_among_several_is_named(llm: LLM, see: Ask) -> None:
    bad = see([draw(1), b"no picture", draw(2)], 3)
    foreign = see([draw(1), lambda: 7], 2)
    alone = see(b"no picture")
    prompt = {"prompt": CLIP * 2, "multi_modal_data": {"video": [draw_clip(1, 2), b"no clip"]}}
    (clip,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    errors = [result.error for result in (bad, alone, clip) if result.error]

    assert ["image", "image", "video"] == [error.param for error in errors]
    assert errors[0].message.endswith(" It is image 1 of this prompt (counted from 0).")
    assert "counted from 0" not in errors[1].message
    assert errors[2].message.endswith(" It is video 1 of this prompt (counted from 0).")
    assert error_of([foreign]).endswith(" It is image 1 of this prompt (counted from 0).")


# --- features ----------------------------------------------------------------------------------------


def test_every_form_of_features_has_the_answer_of_the_pictures(llm: LLM, see: Ask) -> None:
    same = [draw(1), draw(2)]
    features, grids = features_of(llm, *same)
    expected = token_ids([see(same, 2)])
    forms: dict[str, Any] = {
        "3-D tensor": torch.stack(features),
        "list of 2-D tensors": features,
        "dict": {"image_embeds": torch.cat(features), "image_grid_thw": torch.tensor(grids)},
        "dict of a 3-D tensor": {"image_embeds": torch.stack(features), "image_grid_thw": grids},
        "picture and features": [same[0], one_dict(features[1], grids[1])],
        "other precision": torch.stack(features).double(),
    }

    for name, form in forms.items():
        assert expected == token_ids([see(form, 2)]), name


def one_dict(features: torch.Tensor, grid: list[int]) -> dict[str, torch.Tensor]:
    return {"image_embeds": features, "image_grid_thw": torch.tensor([grid])}


def test_features_of_unequal_pictures_need_their_grids(llm: LLM, see: Ask) -> None:
    images = [draw(1, 168, 60), draw(2, 60, 140), draw(3, 84, 84)]
    features, grids = features_of(llm, *images)
    expected = see(images, 3)
    result = see({"image_embeds": torch.cat(features), "image_grid_thw": torch.tensor(grids)}, 3)

    assert token_ids([expected]) == token_ids([result])
    assert [used.num_tokens for used in expected.images] == [
        used.num_tokens for used in result.images
    ]
    assert [("embeds", 0, 0)] * 3 == [
        (used.kind, used.used_width, used.used_height) for used in result.images
    ]


def test_features_in_a_chat_part(llm: LLM) -> None:
    image = draw(1, 168, 84)
    (features,), (grid,) = features_of(llm, image)
    square = draw(2)
    (square_features,), _ = features_of(llm, square)

    def chat(part: dict[str, Any]) -> list[list[int]]:
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
        return token_ids(llm.chat(messages, GREEDY, use_tqdm=False))

    expected = chat({"type": "image", "image": image})
    assert expected == chat({"type": "image_embeds", "image_embeds": one_dict(features, grid)})
    expected = chat({"type": "image", "image": square})
    for form in (square_features, square_features[None]):
        assert expected == chat({"type": "image_embeds", "image_embeds": form})


def test_features_count_as_pictures(llm: LLM, see: Ask) -> None:
    (features,), _ = features_of(llm, draw(1))

    assert error_of([see([features] * 5, 5)]).startswith("At most 4 image(s)")


# --- sizes -------------------------------------------------------------------------------------------


def test_area_is_set_for_the_engine_a_request_or_one_picture(tiny_folder: Path) -> None:
    llm = LLM(
        str(tiny_folder),
        limit_mm_per_prompt={"image": 2},
        mm_processor_kwargs={"max_pixels": 112 * 112},
    )
    image = draw(1, 224, 224)

    def used(images: Any, **options: Any) -> list[tuple[int, int]]:
        data = {"prompt": PICTURE * 2, "multi_modal_data": {"image": images}, **options}
        return sizes(llm.generate(data, GREEDY, use_tqdm=False)[0])

    assert [(112, 112), (112, 112)] == used([image, image])
    assert [(168, 168), (168, 168)] == used(
        [image, image], mm_processor_kwargs={"max_pixels": 168 * 168}
    )
    assert [(112, 112), (56, 56)] == used([image, {"image": image, "max_pixels": 56 * 56}])
    assert [(168, 168), (56, 56)] == used(
        [image, {"image": image, "max_pixels": 56 * 56}],
        mm_processor_kwargs={"images_kwargs": {"max_pixels": 168 * 168}},
    )
    assert [(140, 140), (112, 112)] == used([{"image": image, "min_pixels": 140 * 140}, image])


def test_area_of_generate_is_that_of_prompts_without_one(llm: LLM) -> None:
    prompt = {"prompt": PICTURE, "multi_modal_data": {"image": draw(1, 224, 224)}}
    own = {**prompt, "mm_processor_kwargs": {"max_pixels": 56 * 56}}
    size = {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}
    results = llm.generate([prompt, own], GREEDY, use_tqdm=False, mm_processor_kwargs=size)

    assert [[(112, 112)], [(56, 56)]] == [sizes(result) for result in results]


def test_area_of_one_part_changes_that_picture_only(llm: LLM) -> None:
    image = draw(1, 224, 224)
    parts = [
        {"type": "image", "image": image},
        {"type": "image_url", "image_url": {"url": data_url(image)}, "max_pixels": 84 * 84},
        {"type": "image_url", "image_url": {"url": data_url(image)}, "min_pixels": 1},
    ]
    (result,) = llm.chat([{"role": "user", "content": parts}], GREEDY, use_tqdm=False)

    assert [(224, 224), (84, 84), (224, 224)] == sizes(result)
    assert [64, 9, 64] == [used.num_tokens for used in result.images]


def test_smaller_bound_gives_way_to_the_one_that_is_given(tiny_folder: Path, see: Ask) -> None:
    tiny = see(draw(1, 224, 224), mm_processor_kwargs={"max_pixels": 28 * 28})
    huge = see(draw(1, 20, 20), mm_processor_kwargs={"min_pixels": 280 * 280})
    both = see(draw(1), mm_processor_kwargs={"min_pixels": 200, "max_pixels": 100})
    llm = LLM(str(tiny_folder), mm_processor_kwargs={"max_pixels": 28 * 28})
    prompt = {"prompt": PICTURE, "multi_modal_data": {"image": draw(1, 224, 224)}}

    assert [(28, 28)] == sizes(tiny)
    assert [(280, 280)] == sizes(huge)
    assert error_of([both]).startswith("min_pixels is 200, over max_pixels=100.")
    assert [(28, 28)] == sizes(llm.generate(prompt, GREEDY, use_tqdm=False)[0])


def test_areas_are_merged_key_by_key_and_the_innermost_goes_first(llm: LLM) -> None:
    image, clip = draw(1, 224, 224), draw_clip(1, 2, 224, 224)
    own = {"images_kwargs": {"max_pixels": 84 * 84}}
    prompt = {
        "prompt": PICTURE * 2 + CLIP,
        "multi_modal_data": {
            "image": [image, {"image": image, "max_pixels": 56 * 56}],
            "video": clip,
        },
    }
    call = {"max_pixels": 112 * 112, "videos_kwargs": {"max_pixels": 168 * 168}}
    forms: list[Any] = [
        prompt,
        {**prompt, "mm_processor_kwargs": own},
        Request(prompt=prompt, mm_processor_kwargs=own),
        Request(
            prompt={**prompt, "mm_processor_kwargs": own}, mm_processor_kwargs={"max_pixels": 4}
        ),
    ]
    found = [
        sizes(result)
        for result in llm.generate(forms, GREEDY, use_tqdm=False, mm_processor_kwargs=call)
    ]

    assert [(112, 112), (56, 56), (168, 168)] == found[0]
    assert [(84, 84), (56, 56), (168, 168)] == found[1] == found[2]
    assert [(84, 84), (56, 56), (28, 28)] == found[3]


def test_bounds_around_a_picture_are_merged_and_refused_for_features(llm: LLM, see: Ask) -> None:
    image = draw(1, 224, 224)
    nested = {"image": {"image": image, "max_pixels": 56 * 56, "min_pixels": 28 * 28}}
    (features,), grids = features_of(llm, draw(1))
    embeds = {"image_embeds": features, "image_grid_thw": torch.tensor(grids)}

    assert [(56, 56)] == sizes(see(nested))
    assert [(84, 84)] == sizes(see({**nested, "max_pixels": 84 * 84}))
    for form in ({"image": embeds, "max_pixels": 56 * 56}, {"image": [features], "max_pixels": 1}):
        assert error_of([see(form)]).startswith("multi_modal_data['image'] ")
    assert "unknown key 'max_pixels'" in error_of([see({**embeds, "max_pixels": 56 * 56})])


def test_detail_low_is_the_smallest_size(llm: LLM) -> None:
    image = draw(1, 224, 224)
    url = data_url(image)
    parts = [
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "input_image", "image_url": url, "detail": "low"},
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}, "max_pixels": 84 * 84},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
    ]
    (result,) = llm.chat([{"role": "user", "content": parts}], GREEDY, use_tqdm=False)

    assert [(56, 56), (56, 56), (84, 84), (224, 224)] == sizes(result)


def test_unknown_key_of_one_picture_is_told(see: Ask) -> None:
    error = error_of([see([{"image": draw(1), "resized_width": 4}])])

    assert error.startswith("multi_modal_data['image'] has an unknown key 'resized_width'.")


# --- clips -------------------------------------------------------------------------------------------


def test_every_form_of_a_clip_is_the_same_clip(watch: Ask) -> None:
    images = draw_clip(1, 5)
    stacked = np.stack([as_array(image) for image in images])
    forms: dict[str, Any] = {
        "list of PIL": images,
        "tuple of PIL": tuple(images),
        "list of arrays": list(stacked),
        "list of bytes": [encode(image) for image in images],
        "4-D array": stacked,
        "4-D array, channels first": np.moveaxis(stacked, -1, 1),
        "4-D tensor": torch.from_numpy(stacked),
        "Frames": as_frames(images),
        "with metadata": (stacked, {"fps": 2.0, "total_num_frames": 5}),
        "callable": lambda: images,
        "callable with Frames": lambda: as_frames(images),
        "list of one clip": [images],
        "list of one array": [stacked],
        "list with metadata": [(images, {"fps": 2.0})],
    }
    results = {name: watch(form) for name, form in forms.items()}
    expected = token_ids([results["list of PIL"]])

    assert dict.fromkeys(forms, expected) == {n: token_ids([r]) for n, r in results.items()}
    for result in results.values():
        (used,) = result.images
        assert ("video", 5, 84, 56) == (used.kind, used.num_frames, used.width, used.height)
        assert 3 * 3 * 2 == used.num_tokens
    assert expected != token_ids([watch(images[::-1])])


def test_several_clips_keep_their_order_and_lengths(watch: Ask) -> None:
    clips = [draw_clip(1, 3), draw_clip(2, 6, 112, 56)]
    results = [
        watch(clips, 2),
        watch([as_frames(clip) for clip in clips], 2),
        watch([np.stack([as_array(image) for image in clip]) for clip in clips], 2),
        watch([lambda: clips[0], lambda: as_frames(clips[1])], 2),
    ]

    assert [3, 6] == [used.num_frames for used in results[0].images]
    assert [0, 1] == [used.index for used in results[0].images]
    assert [token_ids(results[:1])] * 4 == [token_ids([result]) for result in results]


def test_pictures_and_clips_share_a_prompt_in_any_order(llm: LLM) -> None:
    image, clip = draw(1, 84, 112), draw_clip(2, 4)
    data = {"image": [image, image], "video": clip}
    answers = []
    for order in (PICTURE + CLIP + PICTURE, CLIP + PICTURE * 2):
        prompt = {"prompt": order, "multi_modal_data": data}
        (result,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        answers.append(token_ids([result]))
        kinds = ["image" if p == "image" else "video" for p in order_of(order)]

        assert kinds == [used.kind for used in result.images]
        assert {0, 1} == {used.index for used in result.images if used.kind == "image"}
        assert [0] == [used.index for used in result.images if used.kind == "video"]
    assert answers[0] != answers[1]


def order_of(prompt: str) -> list[str]:
    return ["image" if "image" in mark else "video" for mark in prompt.split("<|vision_end|>")[:-1]]


def test_frames_in_a_data_url(llm: LLM, watch: Ask) -> None:
    images = draw_clip(1, 4)
    encoded = [encode_base64(image, "JPEG") for image in images]
    url = "data:video/jpeg;base64," + ",".join(encoded)
    decoded = [base64.b64decode(frame) for frame in encoded]

    def chat(part: dict[str, Any]) -> Result:
        return llm.chat([{"role": "user", "content": [part]}], GREEDY, use_tqdm=False)[0]

    expected = token_ids([chat({"type": "video", "video": decoded})])

    assert expected == token_ids([chat({"type": "video_url", "video_url": {"url": url}})])
    assert expected == token_ids([chat({"type": "video_url", "video_url": url})])
    fewer = chat({"type": "video_url", "video_url": {"url": url}, "num_frames": 2})
    assert 2 == fewer.images[0].num_frames
    assert error_of([chat({"type": "video_url", "video_url": url, "fps": 1.0})]).startswith(
        "A list of frames has no times"
    )
    smaller = chat({"type": "video_url", "video_url": url, "max_pixels": 28 * 28})
    assert [(28, 28)] == sizes(smaller)


def test_encoded_clip_is_sampled_as_its_part_says(llm: LLM, watch: Ask) -> None:
    images = draw_clip(1, 10)
    animation = encode_animation(images)

    def chat(**options: Any) -> Result:
        url = f"data:image/gif;base64,{base64.b64encode(animation).decode()}"
        part = {"type": "video_url", "video_url": {"url": url}, **options}
        return llm.chat([{"role": "user", "content": [part]}], GREEDY, use_tqdm=False)[0]

    def num_frames(result: Result) -> int | None:
        return result.images[0].num_frames

    assert 10 == num_frames(watch(animation)) == num_frames(watch(lambda: animation))
    assert 10 == num_frames(chat())
    assert 4 == num_frames(chat(num_frames=4))
    assert 5 == num_frames(chat(fps=1))  # ten frames of half a second
    assert 2 == num_frames(chat(fps=1, num_frames=2))
    part = {"type": "video", "video": animation, "num_frames": 3}
    assert 3 == num_frames(
        llm.chat([{"role": "user", "content": [part]}], GREEDY, use_tqdm=False)[0]
    )


def test_window_key_frames_and_alike_frames_are_a_parts_own_business(llm: LLM) -> None:
    images = [image for drawn in draw_clip(1, 5) for image in (drawn, drawn.copy())]
    for image in images[1::2]:
        image.putpixel((0, 0), (0, 0, 0))  # frames that are the same become one
    encoded = base64.b64encode(encode_animation(images, "PNG")).decode()
    url = f"data:image/png;base64,{encoded}"

    def chat(**options: Any) -> ImageUsed:
        part = {"type": "video_url", "video_url": {"url": url}, **options}
        (result,) = llm.chat([{"role": "user", "content": [part]}], GREEDY, use_tqdm=False)
        return result.images[0]

    assert (1.0, 1.5, 2.0) == chat(start_s=1, end_s=2.4).times_s
    assert (1.0, 2.0) == chat(start_s=1, end_s=2.4, num_frames=2).times_s
    assert 10 == chat(keyframes=True).num_frames  # each frame stands alone
    seen = chat(dedupe_frames=True)
    assert (5, 5) == (seen.num_frames, seen.num_frames_dropped)
    assert (0.0, 1.0, 2.0, 3.0, 4.0) == seen.times_s
    assert 9 == chat(dedupe_frames=254.9).num_frames_dropped
    assert chat().num_frames_dropped is None


def test_result_tells_which_frames_were_seen_and_when(watch: Ask) -> None:
    encoded = watch(encode_animation(draw_clip(1, 10)), mm_processor_kwargs={"num_frames": 4})
    decoded = watch(draw_clip(1, 4))

    assert (0.0, 1.5, 3.0, 4.5) == encoded.images[0].times_s
    assert (0, 3, 6, 9) == encoded.images[0].frame_indices
    assert decoded.images[0].times_s is None
    assert decoded.images[0].frame_indices is None


def test_encoded_clip_is_sampled_as_its_request_or_the_engine_says(
    tiny_folder: Path, watch: Ask
) -> None:
    animation = encode_animation(draw_clip(1, 10))
    prompt = {"prompt": CLIP, "multi_modal_data": {"video": animation}}

    def num_frames(result: Result) -> int | None:
        return result.images[0].num_frames

    def ask(words: dict[str, Any], **options: Any) -> int | None:
        with LLM(str(tiny_folder), **words) as llm:
            return num_frames(llm.generate({**prompt, **options}, GREEDY, use_tqdm=False)[0])

    assert 5 == num_frames(watch(animation, mm_processor_kwargs={"fps": 1}))
    assert 3 == num_frames(
        watch(animation, mm_processor_kwargs={"videos_kwargs": {"num_frames": 3}})
    )
    assert 4 == num_frames(watch(animation, media_io_kwargs={"video": {"num_frames": 4}}))
    assert 4 == num_frames(watch(draw_clip(1, 4), mm_processor_kwargs={"num_frames": 2}))
    for words in (
        {"mm_processor_kwargs": {"num_frames": 6}},
        {"media_io_kwargs": {"video": {"num_frames": 6}}},
    ):
        assert 6 == ask(words)
        assert 2 == ask(words, mm_processor_kwargs={"num_frames": 2})
        assert 10 == ask(words, media_io_kwargs={"video": {"num_frames": -1}})


def encode_animation(images: list[Image.Image], name: str = "GIF") -> bytes:
    file = BytesIO()
    images[0].save(file, name, save_all=True, append_images=images[1:], duration=500)
    return file.getvalue()


def test_frames_that_are_frames_already_are_used_as_they_are(llm: LLM) -> None:
    part = {"type": "video", "video": draw_clip(1, 4), "num_frames": 2}
    error = error_of(llm.chat([{"role": "user", "content": [part]}], GREEDY, use_tqdm=False))

    assert error.startswith("video came as frames, which are used as they are.")


@pytest.mark.parametrize(
    ("video", "start"),
    [
        ([], "multi_modal_data['video'] is a list that is no clip."),
        ("clip.mp4", "multi_modal_data['video'] is a str that is no clip."),
        (draw(1), "multi_modal_data['video'] is a Image that is no clip."),
        (np.zeros((0, 8, 8, 3), np.uint8), "video has no frames, or frames of different sizes."),
        ([draw(1, 60, 60), draw(2, 60, 80)], "video has no frames, or frames of different sizes."),
        ([draw(1, 900, 3)] * 2, "Image dimensions 900x3: one side is over 200 times the other"),
        (b"no clip", "Failed to load video: "),
        (lambda: 5, "video came as a int."),
        ([draw_clip(1, 2)] * 3, "At most 2 video(s) may be provided in one prompt."),
    ],
)
def test_bad_clip_is_told_what_is_wrong(watch: Ask, video: Any, start: str) -> None:
    assert error_of([watch(video)]).startswith(start)


def test_clip_too_long_is_told_a_size_that_fits(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder), max_model_len=64)
    prompt = {"prompt": CLIP, "multi_modal_data": {"video": draw_clip(1, 23)}}
    error = error_of(llm.generate(prompt, GREEDY, use_tqdm=False))
    (advice,) = re.findall(r"max_pixels=(\d+) or less", error)
    advised = {**prompt, "mm_processor_kwargs": {"max_pixels": int(advice)}}

    assert "72 image tokens" in error
    assert [23] == [
        used.num_frames for used in llm.generate(advised, GREEDY, use_tqdm=False)[0].images
    ]


# --- one or many -------------------------------------------------------------------------------------


def test_token_ids_are_whole_numbers_and_nothing_else() -> None:
    assert is_token_ids([1, 2])
    assert is_token_ids((1,))
    for form in ([], "12", b"12", [True], [1, "2"], [[1]], 1, None):
        assert not is_token_ids(form)


def test_conversation_is_a_list_of_messages() -> None:
    message = {"role": "user", "content": "a"}

    assert is_conversation([message])
    for form in ([[message]], "a", message, None):
        assert not is_conversation(form)


def test_prompt_beside_messages_is_refused(llm: LLM) -> None:
    message = {"role": "user", "content": "a"}
    both = Request(prompt="a", messages=[message])
    loose = Request(messages=[message], multi_modal_data={"image": draw(1)})
    first, second = llm.generate([both, loose], GREEDY, use_tqdm=False)

    assert error_of([first]).startswith("prompt comes beside messages.")
    assert error_of([second]).startswith("multi_modal_data comes beside messages.")
