"""What no text for a client may hold: where we are, what we are made of, and whatever is secret."""

import re
from collections.abc import Iterable

_OURS = re.compile(
    # Forms and examples that our own texts show, and paths that are the wire's.
    r"https://host/path|Authorization: Bearer|/v1/[a-z]+(?:/[a-z]+)?|https?://example\.com"
)
_LEAKS = {
    "a memory address": re.compile(r"\b0x[0-9a-fA-F]{3,}|\bobject at\b"),
    "an IPv4 address": re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b"),
    "an IPv6 address": re.compile(r"(?<![\w:])[0-9a-fA-F]{0,4}:(?:[0-9a-fA-F]{0,4}:)+[0-9a-fA-F]*"),
    "a path": re.compile(r"(?:^|[\s'\"(=`])(?:~?/[\w.]|\.\.?/|[A-Za-z]:\\|\\\\)"),
    "a URL": re.compile(r"\b(?:https?|file|ftp|gopher|s3|redis|sqlite|postgresql)://\S"),
    "a name of the code": re.compile(
        r"\b(?:PIL|Pillow|libav\w*|[Ff][Ff]mpeg|PyAV|httpcore2?|anyio|asyncio|urllib|torch|numpy|"
        r"sqlalchemy|psycopg|sqlite3|jinja2?|tokenizers|transformers|celery|pydantic|starlette|"
        r"fastapi|uvicorn|BytesIO|Errno|Traceback|NoneType|\w+(?:Error|Exception|Warning))\b"
    ),
    "a header": re.compile(
        r"\b(?:Content-(?:Length|Encoding|Type)|Set-Cookie|Location|Authorization|"
        r"Transfer-Encoding|Retry-After|User-Agent|X-[A-Z]\w+(?:-\w+)*)\b"
    ),
}


def find_leaks(text: str, secrets: Iterable[str] = ()) -> list[str]:
    """
    Name all that this text gives away.

    Args:
        secrets: words that must not stand in it, such as the host that was asked.
    """
    shown = _OURS.sub("", text)
    found = [f"{kind}: {at[0]!r}" for kind, form in _LEAKS.items() if (at := form.search(shown))]
    return found + [f"a secret: {word!r}" for word in secrets if word.lower() in text.lower()]
