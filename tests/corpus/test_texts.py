"""The eye that looks for leaks: it sees each kind, and no error text of ours troubles it."""

import inspect

import pytest

from media import errors
from tests.corpus.texts import find_leaks


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("cannot identify image file <_io.BytesIO object at 0x7f3a>", "a memory address"),
        ("Failed to connect to 10.0.0.7.", "an IPv4 address"),
        ("Failed to connect to fd00:ec2::254.", "an IPv6 address"),
        ("Failed to connect to [::1].", "an IPv6 address"),
        ("No such file: '/srv/blobs/1'.", "a path"),
        ("No such file: ../secrets.", "a path"),
        (r"No such file: C:\blobs.", "a path"),
        ("It redirects to http://inside/.", "a URL"),
        ("No bucket s3://private-1.", "a URL"),
        ("PIL says no.", "a name of the code"),
        ("[Errno 111] refused.", "a name of the code"),
        ("ZeroDivisionError: no.", "a name of the code"),
        ("The server sent Set-Cookie.", "a header"),
        ("It is HUSH.", "a secret"),
    ],
)
def test_leak_is_found(text: str, kind: str) -> None:
    (found, *_) = find_leaks(text, ["hush"])

    assert found.startswith(kind)


def test_our_own_texts_hold_none() -> None:
    classes = [one for one in vars(errors).values() if isinstance(one, type)]
    texts = [inspect.cleandoc(one.__doc__ or "") for one in classes]

    assert {} == {text: leaks for text in texts if (leaks := find_leaks(text))}
