"""Files decoded in processes: the engine answers as with threads, and a process's end is one result."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine import LLM, Request
from engine.engine import Engine
from engine.errors import BadConfig
from engine.families.protocol import Pixels, Visual
from media.decoded import Fit
from media.decoder import Decoder
from media.images import can_read, decode_image
from media.pool import DecoderPool
from tests.engine.conftest import LIMITS
from tests.engine.idle import assert_idle
from tests.engine.pictures import CLIP, GREEDY, PICTURE, data_url, draw, draw_clip, encode


@pytest.fixture(scope="module")
def with_processes(tiny_folder: Path) -> Iterator[LLM]:
    with LLM(str(tiny_folder), limit_mm_per_prompt=LIMITS, num_media_processes=1) as llm:
        yield llm
        assert_idle(llm.engine)


def pool_of(engine: Engine) -> DecoderPool:
    assert isinstance(engine._decoder, DecoderPool)
    return engine._decoder


def _gif(num_frames: int) -> bytes:
    from io import BytesIO

    file = BytesIO()
    frames = draw_clip(3, num_frames)
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


TURNED = Image.Exif()
TURNED[274] = 6
FORMS: dict[str, tuple[str, Any]] = {
    "JPEG": ("image", encode(draw(1, 300, 200), "JPEG")),
    "already of the right size": ("image", encode(draw(2, 84, 84))),
    "data URL": ("image", None),
    "several": ("image", [encode(draw(n, 90 + n, 60), "JPEG") for n in range(3)]),
    "PIL": ("image", draw(4, 100, 70)),
    "clip": ("video", _gif(4)),
    "clip of odd length": ("video", _gif(3)),
    "clip of files": ("video", [encode(draw(n)) for n in range(2)]),
    "cut short": ("image", encode(draw(1, 300, 200), "JPEG")[:-500]),
    "too narrow": ("image", encode(draw(1, 402, 2))),
    "no clip": ("video", b"nothing"),
}


BAD = ("cut short", "too narrow", "no clip")


@pytest.mark.parametrize("name", FORMS)
def test_answers_are_those_of_threads(llm: LLM, with_processes: LLM, name: str) -> None:
    modality, media = FORMS[name]
    place = PICTURE if modality == "image" else CLIP
    if name == "data URL":
        parts = [{"type": "image_url", "image_url": {"url": data_url(draw(5, 200, 90), "JPEG")}}]
        request = Request(messages=[{"role": "user", "content": parts}], params=GREEDY)
    else:
        count = len(media) if isinstance(media, list) and modality == "image" else 1
        request = Request(place * count, params=GREEDY, multi_modal_data={modality: media})

    (expected,) = llm.stream([request])
    (found,) = with_processes.stream([request])

    assert (expected.error is not None) == (name in BAD)
    assert expected.error == found.error
    assert expected.images == found.images
    if expected.error is None:
        assert expected.outputs[0].token_ids == found.outputs[0].token_ids


def test_pixels_of_one_picture_stay_where_the_process_put_them(with_processes: LLM) -> None:
    processor = with_processes.engine._processor
    request = Request(PICTURE, params=GREEDY, multi_modal_data={"image": FORMS["JPEG"][1]})

    (placed,) = processor.prepare(request).media

    assert not isinstance(placed.content, torch.Tensor)
    assert pool_of(with_processes.engine).num_bytes == placed.content.pixels.numel()


@pytest.mark.parametrize("number", [0, 1])
def test_large_jpegs_are_drafts_only_where_that_is_allowed(tiny_folder: Path, number: int) -> None:
    large = encode(draw(7, 800, 400), "JPEG")
    request = Request(PICTURE, multi_modal_data={"image": large})
    area = {"max_pixels": 28 * 28 * 8}
    seen = []

    for may_draft in (False, True):
        with LLM(
            str(tiny_folder),
            draft_jpegs=may_draft,
            num_media_processes=number,
            mm_processor_kwargs=area,
        ) as llm:
            (placed,) = llm.engine._processor.prepare(request).media
            assert isinstance(placed.content, Visual)
            seen.append(placed.content.pixels[0].numpy().copy())

    height_px, width_px, _ = seen[0].shape
    for may_draft, pixels in zip((False, True), seen, strict=True):
        assert np.array_equal(
            _decode_to(large, Fit(width_px, height_px, may_draft=may_draft)), pixels
        )
    assert not np.array_equal(seen[0], seen[1])


def _decode_to(encoded: bytes, fit: Fit) -> Pixels:
    return decode_image(encoded, ask=lambda _: fit).pixels()


def test_nothing_is_decoded_that_will_be_refused_for_its_length(with_processes: LLM) -> None:
    options = {"min_pixels": 10**9, "max_pixels": 10**9}
    request = Request(
        PICTURE,
        params=GREEDY,
        multi_modal_data={"image": FORMS["JPEG"][1]},
        mm_processor_kwargs=options,
    )

    (result,) = with_processes.stream([request])

    assert result.error is not None
    assert "prompt_too_long" == result.error.code


def test_process_that_is_killed_is_replaced_under_the_engine(with_processes: LLM) -> None:
    request = Request(PICTURE, params=GREEDY, multi_modal_data={"image": FORMS["JPEG"][1]})
    for pid in pool_of(with_processes.engine).pids:
        os.kill(pid, signal.SIGKILL)

    (result,) = with_processes.stream([request])

    assert result.error is None


def test_closing_the_engine_ends_its_processes(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder), num_media_processes=1)
    decoder: Decoder = llm.engine._decoder
    assert isinstance(decoder, DecoderPool)

    llm.close()

    assert frozenset() == decoder.pids


def test_engine_that_nobody_closes_takes_its_processes_along(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder), num_media_processes=1)
    decoder = pool_of(llm.engine)

    del llm
    gc.collect()

    assert frozenset() == decoder.pids


@pytest.mark.parametrize("number", [0, 1])
def test_tiff_is_read_where_it_is_asked_for(llm: LLM, tiny_folder: Path, number: int) -> None:
    tiff = {"prompt": PICTURE, "multi_modal_data": {"image": encode(draw(1), "TIFF")}}
    png = {"prompt": PICTURE, "multi_modal_data": {"image": encode(draw(1), "PNG")}}

    (refused,) = llm.generate(tiff, GREEDY, use_tqdm=False)
    with LLM(str(tiny_folder), image_formats=["TIFF"], num_media_processes=number) as with_tiff:
        read, same = with_tiff.generate([tiff, png], GREEDY, use_tqdm=False)

    assert refused.error is not None
    assert "image_format_not_supported" == refused.error.code
    assert read.outputs[0].token_ids == same.outputs[0].token_ids


@pytest.mark.parametrize("number", [0, 1])
def test_larger_pictures_are_read_where_they_are_let_in(tiny_folder: Path, number: int) -> None:
    prompts = [
        {"prompt": PICTURE, "multi_modal_data": {"image": encode(draw(1, 60, height))}}
        for height in (50, 51)
    ]

    with LLM(str(tiny_folder), max_image_pixels=3_000, num_media_processes=number) as llm:
        fits, is_larger = llm.generate(prompts, GREEDY, use_tqdm=False)

    assert fits.error is None
    assert is_larger.error is not None
    assert "image_too_large" == is_larger.error.code
    assert "maximum of 3000 pixels" in is_larger.error.message


@pytest.mark.parametrize("number", [0, -1, 178_956_971, 1.5])
def test_number_of_pixels_is_checked(tiny_folder: Path, number: Any) -> None:
    with pytest.raises(BadConfig, match="max_image_pixels"):
        LLM(str(tiny_folder), max_image_pixels=number)


def test_formats_that_cannot_be_read_are_refused_at_the_start(tiny_folder: Path) -> None:
    with pytest.raises(BadConfig, match="image_formats takes TIFF and HEIC"):
        LLM(str(tiny_folder), image_formats=["PSD"])
    if not can_read("HEIC"):
        with pytest.raises(BadConfig, match=r"HEIC is not installed here.*heic"):
            LLM(str(tiny_folder), image_formats=["HEIC"])


def test_number_of_processes_is_checked(tiny_folder: Path) -> None:
    with pytest.raises(BadConfig, match="num_media_processes must be a whole number of 0 or more"):
        LLM(str(tiny_folder), num_media_processes=-1)
