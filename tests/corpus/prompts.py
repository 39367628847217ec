"""Prompts, parameters and lines that are odd or mean harm (T1 to T17, and A1 to A9 as far as they are lines)."""

import gzip
import json
from collections.abc import Callable, Mapping
from typing import Any

from tests.corpus.cases import (
    OK,
    STAR,
    WORD,
    Asked,
    Case,
    Place,
    build_body,
    build_line,
    data_url,
    image_case,
    image_part,
    sample,
)
from tests.tasks.fakes import MODEL

BAD_PARAMETER = "bad_sampling_params"
NOT_SUPPORTED = "unsupported_parameter"
BAD_JSON = "invalid_json_line"
BAD_NAME = "invalid_custom_id"

DESCRIBE = "Describe the image."
NO_IMAGE = "There is no image."
SPECIALS = "<image> <|image_pad|> <|vision_start|> <|im_end|> [INST] <s> "


def star() -> dict[str, Any]:
    return image_part(data_url(sample("small.png")))


def ask_body(**changes: Any) -> Asked:
    return Asked(build_line({**build_body(star(), question=DESCRIBE), **changes}))


def body_case(
    id: str, what: str, expected: str, *, says: str | None = None, note: str = "", **changes: Any
) -> Case:
    """A good body, but for what is changed in it."""
    return Case(id, what, lambda place: ask_body(**changes), expected, says, note)


def raw_case(id: str, what: str, old: str, new: str, expected: str) -> Case:
    """A good line in which one text stands in the place of another, as JSON writers never write it."""

    def ask(place: Place) -> Asked:
        line = build_line(build_body(star(), question=DESCRIBE, seed=7))
        assert line.count(old.encode()) == 1
        return Asked(line.replace(old.encode(), new.encode()))

    return Case(id, what, ask, expected)


def text_case(
    id: str, what: str, text: str, expected: str, *, says: str | None = None, note: str = ""
) -> Case:
    """Words without a picture."""
    return body_case(
        id, what, expected, says=says, note=note, messages=[{"role": "user", "content": text}]
    )


def user(*parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def line_case(id: str, what: str, line: Callable[[], bytes], expected: str, **words: Any) -> Case:
    return Case(id, what, lambda place: Asked(line()), expected, **words)


def named(custom_id: Any) -> Callable[[], bytes]:
    return lambda: json.dumps(
        {
            "custom_id": custom_id,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": MODEL, **build_body(star(), question=DESCRIBE)},
        }
    ).encode()


def packed_without_a_line_end() -> bytes:
    lines = (build_line(build_body(question=f"What is {n}?")) for n in range(1000))
    packed = (gzip.compress(line, mtime=0) for line in lines)
    return next(content for content in packed if b"\n" not in content)


NESTED = '"metadata": ' + "[" * 100_000 + "]" * 100_000

PROMPTS: tuple[Case, ...] = (
    body_case(
        "T1a",
        "special words behind the image",
        OK,
        messages=user(star(), text(SPECIALS + DESCRIBE)),
    ),
    body_case(
        "T1b",
        "special words before the image",
        OK,
        messages=user(text(SPECIALS), star(), text(DESCRIBE)),
    ),
    text_case("T2", "a placeholder without an image", "<|image_pad|> " + DESCRIBE, OK),
    text_case("T3", "no image for a question about one", DESCRIBE, OK, says=NO_IMAGE),
    body_case("T4", "one image over the limit", "too_many_images", messages=user(*[star()] * 5)),
    body_case(
        "T5",
        "10,000 images",
        "too_many_images",
        messages=user(*[image_part("data:image/png;base64,AAAA")] * 10_000),
    ),
    text_case("T6", "a prompt of 10 MB", "word " * 2_000_000, "prompt_too_long"),
    text_case("T7a", "an empty prompt", "", OK),
    text_case("T7b", "white space", " \n\t \u3000", OK),
    text_case("T8a", "half a surrogate pair", "a \ud800 b", "bad_prompt"),
    text_case("T8b", "NUL", "a \0 b", OK),
    text_case("T8c", "a mark of byte order", "\ufeff" + DESCRIBE, OK),
    text_case("T8d", "right to left, and back", "\u202eabc\u202c שלום", OK),
    text_case(
        "T8e", "emoji and zero width", "\U0001f468\u200d\U0001f469\u200d\U0001f466 \u200b", OK
    ),
    body_case("T9a", "max_tokens 0", BAD_PARAMETER, max_tokens=0),
    body_case("T9b", "max_tokens -1", BAD_PARAMETER, max_tokens=-1),
    body_case("T9c", "max_tokens 2^31", "max_tokens_too_large", max_tokens=2**31),
    raw_case("T9d", "max_tokens 1e400", '"max_tokens": 48', '"max_tokens": 1e400', BAD_JSON),
    raw_case("T9e", "max_tokens NaN", '"max_tokens": 48', '"max_tokens": NaN', BAD_JSON),
    body_case("T9f", "max_tokens as text", BAD_PARAMETER, max_tokens="5"),
    body_case("T9g", "max_tokens true", BAD_PARAMETER, max_tokens=True),
    body_case("T10a", "temperature -1", BAD_PARAMETER, temperature=-1),
    raw_case("T10b", "temperature 1e999", '"temperature": 0', '"temperature": 1e999', BAD_JSON),
    body_case("T11", "n of a billion", BAD_PARAMETER, n=10**9),
    body_case("T12", "10,000 stops", OK, says=STAR, stop=[f"stop {n}" for n in range(10_000)]),
    body_case("T13a", "a regex that never ends", NOT_SUPPORTED, guided_regex="(a+)+$"),
    body_case("T13b", "a grammar", NOT_SUPPORTED, guided_grammar='root ::= "a" root'),
    body_case(
        "T13c",
        "a schema",
        NOT_SUPPORTED,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    ),
    text_case("T14", "Jinja", "{{7*7}} {% for x in range(9) %}x{% endfor %}", OK),
    body_case("T15a", "a template", NOT_SUPPORTED, chat_template="{{ messages }}"),
    body_case("T15b", "words for the processor", NOT_SUPPORTED, mm_processor_kwargs={"x": 1}),
    body_case(
        "T15c",
        "embeddings",
        "invalid_messages",
        messages=user({"type": "image_embeds", "image_embeds": "AAAA"}),
    ),
    body_case("T15d", "trust in remote code", NOT_SUPPORTED, trust_remote_code=True),
    body_case("T16", "an unknown model", "mismatched_model", model="gpt-9"),
    line_case(
        "T17", "a line that is not UTF-8", lambda: named("bad")().replace(b"bad", b"\xff"), BAD_JSON
    ),
)

LINES: tuple[Case, ...] = (
    raw_case("A4a", "100,000 levels", '"seed": 7', NESTED, BAD_JSON),
    raw_case("A4b", "40 levels", '"seed": 7', '"metadata": ' + "[" * 40 + "]" * 40, BAD_JSON),
    raw_case("A5", "a key twice", '"seed": 7', '"seed": 7, "seed": 8', BAD_JSON),
    raw_case("A6a", "1e999", '"seed": 7', '"top_p": 1e999', BAD_JSON),
    raw_case("A6b", "2^64 + 1", '"seed": 7', f'"seed": {2**64 + 1}', BAD_JSON),
    raw_case("A6c", "a number of 400 digits", '"seed": 7', '"seed": ' + "9" * 400, BAD_JSON),
    line_case("A7a", "a packed line", packed_without_a_line_end, BAD_JSON),
    image_case(
        "A7b",
        "an image that is a gzip bomb",
        lambda: gzip.compress(bytes(100_000_000), 9),
        "image_format_not_supported",
    ),
    line_case("A9a", "custom_id ../..", named("../.."), OK, says=STAR),
    line_case("A9b", "custom_id %2e%2e%2f", named("%2e%2e%2f"), OK, says=STAR),
    line_case("A9c", "custom_id CON", named("CON"), OK, says=STAR),
    line_case("A9d", "custom_id with NUL", named("a\0b"), BAD_NAME),
    line_case("A9e", "custom_id of 1 MB", named("x" * 1_000_000), BAD_NAME),
    line_case("A9f", "custom_id of the line before", named("before"), "duplicate_custom_id"),
    line_case("A13a", "custom_id of SQL", named("'; DROP TABLE items; --"), OK, says=STAR),
    Case(
        "A2",
        "a line of 100 MB",
        lambda place: Asked(b'{"custom_id": "' + b"x" * 100_000_000),
        "line_too_long",
        note="in place of 2 GB; no line of more than 16 MiB is taken here",
    ),
    Case("A1a", "lines that end in CRLF", lambda place: Asked(good(), line_end=b"\r\n"), OK, WORD),
    Case(
        "A1b", "a mark of byte order", lambda place: Asked(good(), head=b"\xef\xbb\xbf"), OK, WORD
    ),
    Case("A1c", "no end of the last line", lambda place: Asked(good(), tail=b""), OK, WORD),
    Case("A1d", "a blank line", lambda place: Asked(b"  "), "blank_line"),
)


def good() -> bytes:
    return build_line(build_body(image_part(data_url(sample("word.png"))), question=DESCRIBE))
