"""Data URLs: the one form that is read, and the many that are not."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from media.data_url import decode_data_url, decode_frames_url, is_data_url, media_type_of
from media.errors import BadDataUrlError, ImageTooLargeError, VideoTooLargeError
from media.limits import ImageLimits, VideoLimits
from tests.media.files import catch

IMAGE = ImageLimits(max_bytes=1000)
VIDEO = VideoLimits(max_bytes=1000, max_frames=3)


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


@given(st.binary(min_size=1, max_size=1000))
def test_bytes_come_back_with_the_media_type(content: bytes) -> None:
    url = f"data:image/jpeg;base64,{in_base64(content)}"

    assert (content, "image/jpeg") == decode_data_url(url, IMAGE)


def test_case_of_the_header_does_not_matter() -> None:
    assert (b"abc", "image/png") == decode_data_url("DATA:Image/PNG;BASE64,YWJj", IMAGE)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "data:",
        "data:,",
        "data:image/png",
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:image/png,abc",
        "data:image/png,%89PNG",
        "data:;base64,YWJj",
        "data:image/;base64,YWJj",
        "data:text/html;base64,YWJj",
        "data:application/octet-stream;base64,YWJj",
        "data:image/png;charset=utf-8;base64,YWJj",
        "data:image/png;base64;base64,YWJj",
        "data:image/png;base64;charset=utf-8,YWJj",
        "data:image/png;name=/etc/passwd;base64,YWJj",
        "data:image/png;base64,YWJ",
        "data:image/png;base64,YWJj=",
        "data:image/png;base64,YQ=",
        "data:image/png;base64,YQ==YQ==",
        "data:image/png;base64,YW Jj",
        "data:image/png;base64,YWJj\n",
        "data:image/png;base64,YWJj\r\nYWJj",
        "data:image/png;base64,YW%4Aj",
        "data:image/png;base64,YQ%3D%3D",
        "data:image/png;base64,-_-_",
        "data:image/png;base64,ÿÿÿÿ",
        "data:image/png;base64,YWJj,YWJj",
        "data:image/png;base64,YWJj#part",
        " data:image/png;base64,YWJj",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "data:image/" + "x" * 500 + ";base64,YWJj",
        "data:video/jpeg;base64,YWJj",
    ],
)
def test_other_forms_are_refused(url: str) -> None:
    error = catch(BadDataUrlError, decode_data_url, url, IMAGE)

    assert "passwd" not in str(error)


@pytest.mark.parametrize("num_bytes", [998, 999, 1000])
def test_size_limit_is_exact(num_bytes: int) -> None:
    url = f"data:image/png;base64,{in_base64(bytes(num_bytes))}"

    content, _ = decode_data_url(url, IMAGE)

    assert num_bytes == len(content)


@pytest.mark.parametrize("num_bytes", [1001, 1002, 1003])
def test_one_byte_over_the_limit_is_refused(num_bytes: int) -> None:
    content = in_base64(bytes(num_bytes))

    catch(ImageTooLargeError, decode_data_url, f"data:image/png;base64,{content}", IMAGE)
    catch(VideoTooLargeError, decode_data_url, f"data:video/mp4;base64,{content}", VIDEO)


def test_size_is_judged_before_the_base64_is() -> None:
    url = "data:image/png;base64," + "!" * 4000

    catch(ImageTooLargeError, decode_data_url, url, IMAGE)


def test_frames_come_back_in_order() -> None:
    url = "data:video/jpeg;base64," + ",".join(in_base64(part) for part in (b"a", b"bc", b"d"))

    assert (b"a", b"bc", b"d") == decode_frames_url(url, VIDEO)


def test_a_million_frames_are_counted_not_decoded() -> None:
    url = "data:video/jpeg;base64," + "AAAA," * 1_000_000

    error = catch(VideoTooLargeError, decode_frames_url, url, VIDEO)

    assert "1000001 frames" in str(error)


def test_frames_together_stay_within_the_bytes() -> None:
    url = "data:video/jpeg;base64," + ",".join([in_base64(bytes(600))] * 2)

    catch(VideoTooLargeError, decode_frames_url, url, VIDEO)


@pytest.mark.parametrize(
    "url",
    [
        "data:video/jpeg;base64,",
        "data:video/jpeg;base64,YWJj,,YWJj",
        "data:video/jpeg;base64,YWJj,",
        "data:video/jpeg;base64,YWJj, YWJj",
        "data:video/mp4;base64,YWJj",
        "data:image/jpeg;base64,YWJj",
        "https://example.com/clip",
    ],
)
def test_other_forms_of_frames_are_refused(url: str) -> None:
    catch(BadDataUrlError, decode_frames_url, url, VIDEO)


@given(st.text(max_size=60))
def test_any_text_gives_bytes_or_our_error(text: str) -> None:
    url = "data:image/png;base64," + text
    try:
        content, _ = decode_data_url(url, IMAGE)
    except BadDataUrlError:
        return

    assert in_base64(content) == text or in_base64(content)[:-2] == text[:-2].rstrip("=")


def test_scheme_and_type_are_told_without_decoding() -> None:
    assert is_data_url("Data:anything")
    assert not is_data_url("http://data:")
    assert "video/mp4" == media_type_of("data:video/mp4;base64,!")
