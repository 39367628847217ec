"""What a line may say about pictures, segments and splits: refused by name, before anything runs."""

from typing import Any

import pytest

from media.errors import VideoTooLargeError
from media.segments import Cut
from tasks.bodies import MAX_SPLIT_IMAGES, ImagePolicy, check_body, find_detail, read_cut
from tasks.config import MediaLimits
from tasks.errors import BadLineError

VIDEO = {"type": "video_url", "video_url": {"url": "https://example.org/a.mp4"}}
VIDEO_WITH_DETAIL = {"type": "video_url", "video_url": {"url": "https://h/a.mp4", "detail": "low"}}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.jpg"}}


def check(*parts: dict[str, Any], limits: MediaLimits | None = None, **body: Any) -> Any:
    content = [*parts, {"type": "text", "text": "What?"}]
    return check_body(
        {"model": "m", "messages": [{"role": "user", "content": content}], **body},
        model="m",
        limits=limits or MediaLimits(image=2, video=2),
    )


@pytest.mark.parametrize(
    ("segments", "cut"),
    [
        ({"seconds": 10}, Cut(seconds=10)),
        ({"count": 30, "overlap": 2.5}, Cut(count=30, overlap_s=2.5)),
        ({"seconds": 10, "overlap": None, "min_seconds": 3}, Cut(seconds=10, min_s=3)),
        (None, None),
    ],
)
def test_segments_are_read(segments: Any, cut: Cut | None) -> None:
    part = {**VIDEO, "segments": segments}

    assert 1 == check(part).num_videos
    assert cut == read_cut(part)


def show(**given: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "https://example.org/a.jpg", **given}}


@pytest.mark.parametrize(("given", "detail"), [({"detail": "low"}, "low"), ({}, None)])
def test_detail_of_a_picture_is_read(given: dict[str, Any], detail: str | None) -> None:
    assert 1 == check(show(**given)).num_images
    assert detail == find_detail(show(**given))


@pytest.mark.parametrize("part", [show(detail="tiny"), show(detail={}), VIDEO_WITH_DETAIL])
def test_detail_that_would_be_ignored_is_refused(part: dict[str, Any]) -> None:
    with pytest.raises(BadLineError, match="detail") as caught:
        check(part)

    assert "invalid_messages" == caught.value.line_code


@pytest.mark.parametrize(
    ("segments", "code", "words"),
    [
        (10, "invalid_messages", "segments such as"),
        ([], "invalid_messages", "segments such as"),
        ({}, "bad_segments", "either seconds or count"),
        ({"seconds": 10, "count": 3}, "bad_segments", "either seconds or count"),
        ({"seconds": "10"}, "invalid_messages", "numbers"),
        ({"seconds": True}, "invalid_messages", "numbers"),
        ({"count": 2.5}, "invalid_messages", "whole"),
        ({"seconds": 10, "step": 5}, "invalid_messages", "segments.'step'"),
        ({"seconds": -1}, "bad_segments", "segments.seconds"),
        ({"seconds": 10, "overlap": 10}, "bad_segments", "overlap"),
    ],
)
def test_segments_that_cannot_be_are_refused(segments: Any, code: str, words: str) -> None:
    with pytest.raises(BadLineError, match=words) as caught:
        check({**VIDEO, "segments": segments})

    assert (code, "messages") == (caught.value.line_code, caught.value.param)
    assert "messages[0].content[0]" in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "body", "words"),
    [
        ([{**VIDEO, "segments": {"count": 2}}, VIDEO], {}, "no other video"),
        ([{**VIDEO, "segments": {"count": 2}}], {"n": 2}, "n must be 1"),
        ([IMAGE] * 3, {"n": 2, "image_policy": "split"}, "n must be 1"),
        ([{**IMAGE, "segments": {"count": 2}}], {}, "'segments'"),
        (
            [{**VIDEO, "segments": {"count": 2}}, *[IMAGE] * 3],
            {"image_policy": "split"},
            "At most 2 image",
        ),
        ([IMAGE] * (MAX_SPLIT_IMAGES + 1), {"image_policy": "split"}, "at most 256 images"),
    ],
)
def test_what_cannot_be_joined_again_is_refused(
    parts: list[dict[str, Any]], body: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadLineError, match=words):
        check(*parts, **body)


def test_split_takes_all_images_and_none_where_they_are_switched_off() -> None:
    body = check(*[IMAGE] * 5, image_policy="split")

    assert (5, ImagePolicy.SPLIT) == (body.num_images, body.image_policy)
    with pytest.raises(BadLineError, match="At most 0 image"):
        check(IMAGE, image_policy="split", limits=MediaLimits(image=0))
    assert 2 == check(IMAGE, IMAGE, n=2, image_policy="split").num_images


def test_more_frames_than_the_limit_are_refused_where_that_is_known() -> None:
    limits = MediaLimits(frames=8)
    asked: list[dict[str, Any]] = [
        {"num_frames": 9},
        {"num_frames": 9, "segments": {"count": 2}},
    ]

    for options in asked:
        with pytest.raises(BadLineError, match=r"At most 8 frame.* asks for 9") as caught:
            check({**VIDEO, **options}, limits=limits)
        assert ("too_many_frames", "messages") == (caught.value.line_code, caught.value.param)
        check({**VIDEO, **options}, limits=limits, image_policy="sample")
        check({**VIDEO, **options}, limits=MediaLimits())
    for options in ({"num_frames": 8}, {}, {"num_frames": 9, "fps": 1}, {"num_frames": -1}):
        check({**VIDEO, **options}, limits=limits)


def show_list(num_listed: int, **options: Any) -> dict[str, Any]:
    url = "data:video/jpeg;base64," + ",".join(["AAAA"] * num_listed)
    return {"type": "video_url", "video_url": {"url": url}, **options}


def test_frames_of_a_list_are_counted_before_anything_runs() -> None:
    limits = MediaLimits(frames=8)

    for options in ({"num_frames": -1}, {"num_frames": 20}, {"fps": 1}):
        with pytest.raises(BadLineError, match=r"At most 8 frame.* asks for 9") as caught:
            check(show_list(9, **options), limits=limits)
        assert ("too_many_frames", "messages") == (caught.value.line_code, caught.value.param)
        check(show_list(9, **options), limits=limits, image_policy="sample")
        check(show_list(8, **options), limits=limits)
    check(show_list(9), limits=limits)  # what nobody asked for gives way
    check(show_list(9, num_frames=8), limits=limits)


def test_list_of_more_frames_than_are_ever_taken_is_refused_before_anything_runs() -> None:
    for policy in ImagePolicy:
        with pytest.raises(BadLineError, match="holds 769 frames; at most 768") as caught:
            check(show_list(769, num_frames=4), image_policy=policy)
        assert VideoTooLargeError.code == caught.value.line_code
    check(show_list(768, num_frames=4))
