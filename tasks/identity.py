"""
What makes two submissions the same, whichever way they come: the identity behind an idempotency key.

REST and Redis say the same things with the same names, but not in the same form: one demands what
the other fills in. So what is hashed is a normal form, and one key over both faces is one job.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import orjson

METHOD: Final = "POST"
ENDPOINT: Final = "/v1/chat/completions"

_DEFAULTS: Final[Mapping[str, Any]] = {
    "endpoint": ENDPOINT,
    "completion_window": "24h",
    "priority": 0,
    "image_policy": "reject",
    "on_invalid": "fail",
}
_NO_PART: Final = frozenset({"tenant", "idempotency_key"})


def hash_submission(fields: Mapping[str, Any]) -> bytes:
    """
    Of what is asked for; spaces, the order of keys and what stands for a default make no difference.

    Args:
        fields: by the wire's names, checked. `model` beside `input_file_id` is no part of it: a
            file's lines name their model.

    Raises:
        ValueError: something in it is no JSON: half of a surrogate pair, a number without end.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    said = {**_DEFAULTS, **given}
    model = said.pop("model", None)
    if "requests" in said:
        lines = [complete_line(line, said["endpoint"], model) for line in said["requests"]]
        said["requests"] = lines
        if model is not None and lines and find_model(lines[0]) != model:
            said["model"] = model
    for name in _NO_PART:
        said.pop(name, None)
    try:
        canonical = orjson.dumps(said, option=orjson.OPT_SORT_KEYS)
    except TypeError as error:  # orjson's own error for text and numbers that it cannot write
        raise ValueError("this is no JSON") from error
    return hashlib.sha256(canonical).digest()


def complete_line(line: Any, endpoint: str, model: str | None = None) -> Any:
    """
    A line as a file would hold it: `method`, `url` and, with a `model`, `body.model` may be left out.

    What is no object stays as it is: the line will be refused when it becomes an item.
    """
    if not isinstance(line, dict):
        return line
    complete = {"method": METHOD, "url": endpoint, **line}
    if model is not None and isinstance(complete.get("body"), dict):
        complete["body"] = {"model": model, **complete["body"]}
    return complete


def find_model(line: Any) -> Any:
    """What a line names as its model, whatever that is; None where it names none."""
    body = line.get("body") if isinstance(line, dict) else None
    return body.get("model") if isinstance(body, dict) else None
