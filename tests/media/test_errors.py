"""What every error of the room promises to whoever turns it into an answer."""

import pickle

import pytest

from media import errors
from media.errors import Fault, MediaError
from tests.media.files import assert_fit_for_clients


def all_classes() -> list[type[MediaError]]:
    found = [MediaError]
    for parent in found:
        found.extend(parent.__subclasses__())
    return [found_class for found_class in found if found_class.__module__ == errors.__name__]


@pytest.mark.parametrize("error_class", all_classes())
def test_default_text_is_fit_for_clients(error_class: type[MediaError]) -> None:
    error = error_class()

    assert_fit_for_clients(error)
    assert "\n" not in str(error)


def test_codes_are_words_and_belong_to_one_class_each() -> None:
    codes = [error_class.code for error_class in all_classes()]

    assert len(codes) == len(set(codes))
    assert all(code.replace("_", "").isalpha() and code.islower() for code in codes)


def test_codes_that_clients_match_on_stay() -> None:
    codes = {error_class.code for error_class in all_classes()}

    assert codes >= {
        "bad_data_url",
        "image_empty",
        "image_format_not_supported",
        "image_too_large",
        "image_too_narrow",
        "image_truncated",
        "image_unreadable",
        "video_format_not_supported",
        "video_has_no_frames",
        "video_too_large",
        "video_truncated",
        "video_unreadable",
    }


def test_only_what_a_machine_lacks_is_the_operators_fault() -> None:
    operators = {c.code for c in all_classes() if c.fault is Fault.OPERATOR}

    assert {"video_support_missing", "decoders_away"} == operators


def test_errors_survive_the_way_between_processes() -> None:
    error = errors.ImageTooLargeError("Too large. Scale it down.")

    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own object

    assert type(copy) is type(error)
    assert str(copy) == str(error)
