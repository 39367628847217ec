"""
Lines of a batch's input, as OpenAI's wire has them: what is asked about one picture or clip.

The media go inside the line or are uploaded before, so the server needs no access to the files.
"""

import json
from base64 import b64encode
from collections.abc import Mapping
from mimetypes import guess_type
from pathlib import Path
from typing import Any, Final

MAX_CUSTOM_ID_CHARS: Final = 256


def build_line(
    custom_id: str, model: str, media: dict[str, Any], prompt: str, **sampling: Any
) -> bytes:
    """
    Args:
        custom_id: the client's name for the item; what is too long is cut.
        media: a part of the message, of `build_picture` or `build_clip`.
        sampling: `max_tokens` and the like.
    """
    content = [media, {"type": "text", "text": prompt}]
    line = {
        "custom_id": custom_id[:MAX_CUSTOM_ID_CHARS],
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": model, "messages": [{"role": "user", "content": content}], **sampling},
    }
    return json.dumps(line).encode() + b"\n"


def build_picture(source: str) -> dict[str, Any]:
    """A picture that lies there: a data URL of `encode`, or the id of an uploaded file."""
    return {"type": "image_url", "image_url": {"url": source}}


def build_clip(
    source: str, num_frames: int, segments: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """As `build_picture`; the server looks at so many frames, of each segment where there are some."""
    part = {"type": "video_url", "video_url": {"url": source}, "num_frames": num_frames}
    return part if segments is None else {**part, "segments": dict(segments)}


def encode(path: Path) -> str:
    """
    A file as a data URL. What it holds is for the server to find out.

    Raises:
        OSError: it cannot be read.
    """
    kind = guess_type(path.name)[0] or ""
    if not kind.startswith(("image/", "video/")):
        kind = "image/jpeg"  # only a claim: the bytes decide
    return f"data:{kind};base64,{b64encode(path.read_bytes()).decode()}"
