"""
What a case is: an id of the list, a program that makes the input, and how it has to end.

The ids are those of a list of 120 inputs that a service must survive: I images, U addresses, V
clips, T prompts and parameters, A files, ids and requests. A letter behind an id is one of a family.
"""

import base64
import json
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tests.media.servers import Answer, Server
from tests.tasks.fakes import MODEL

ROOT = Path(__file__).parents[2]
OK = "ok"

STAR = "A large purple star at the left on a black background."
WORD = 'The text reads "darkroom".'
MOVES = "The red circle moves from the left to the right."

PLANTED = "hush-7f3a9c"
"""In URLs, headers, metadata of pictures and the worker's own environment: it may come out nowhere."""


@dataclass(frozen=True)
class Asked:
    """
    What a case hands in: one line of a job, between two that are good.

    Args:
        line: as it stands in the manifest.
        network: what the fetcher may reach and how names are answered; see `tests.corpus.worker`.
        secrets: beside what is planted everywhere, words that must not come out.
        canaries: servers that nobody may have asked.
        head, line_end, tail: around the lines of the manifest, in place of what is usual.
    """

    line: bytes
    network: Mapping[str, Any] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    canaries: tuple[Server, ...] = ()
    head: bytes = b""
    line_end: bytes = b"\n"
    tail: bytes | None = None


class Place(Protocol):
    """What a case may use while it is made."""

    def upload(self, content: bytes, filename: str = "upload.bin") -> str:
        """Hand in a file; returns its id, as `file-…`."""

    @property
    def folder(self) -> Path:
        """For files that both sides read."""

    def serve(
        self,
        answer: Answer | Mapping[str, Answer],
        address: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
    ) -> Server:
        """Answer on a free port of loopback until the case is over."""


@dataclass(frozen=True)
class Case:
    """
    Args:
        id: of the list, such as I6b.
        what: a few words for the table.
        ask: makes the input.
        expected: `ok`, or the stable code of the item's error.
        says: what the model must say where it is ok: it sees well enough to show a wrong picture.
        note: what is smaller here than the list has it.
        is_slow: run only where all are asked for.
        max_growth_mb: what it may cost in memory at most; more than the usual needs a note.
    """

    id: str
    what: str
    ask: Callable[[Place], Asked]
    expected: str
    says: str | None = None
    note: str = ""
    is_slow: bool = False
    max_growth_mb: float = 64.0


def build_line(body: Mapping[str, Any], custom_id: str = "bad") -> bytes:
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions"}
    return json.dumps({**line, "body": {"model": MODEL, **body}}).encode()


def build_body(*parts: Mapping[str, Any], question: str, **options: Any) -> dict[str, Any]:
    """A question about these parts, answered in the likeliest words."""
    content = [*parts, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "temperature": 0, "max_tokens": 48, **options}


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def video_part(url: str, **options: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}, **options}


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def ask_about_image(
    build: Callable[[], bytes], kind: str, is_uploaded: bool, place: Place
) -> Asked:
    content = build()
    url = place.upload(content) if is_uploaded else data_url(content, kind)
    return Asked(build_line(build_body(image_part(url), question="Describe the image.")))


def image_case(
    id: str,
    what: str,
    build: Callable[[], bytes],
    expected: str,
    *,
    kind: str = "image/png",
    is_uploaded: bool = False,
    **words: Any,
) -> Case:
    """A picture in a data URL, or as an uploaded file."""
    return Case(id, what, partial(ask_about_image, build, kind, is_uploaded), expected, **words)


def sample(name: str) -> bytes:
    return (ROOT / "samples" / name).read_bytes()
