"""
The lines of the artifacts, as OpenAI's wire has them: an ended item in, one JSON object out.

Pure functions. What is written twice is equal, so that a finish that runs again writes the same.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from storage.ids import JobId
from storage.items import Ended
from storage.parts import Answer
from storage.states import ItemState

_SERVER_CODES: Final = frozenset({"engine_failure", "worker_crash", "internal_error"})
_PARAMS: Final[Mapping[str, str]] = {
    "too_many_images": "messages",
    "too_many_videos": "messages",
    "too_many_frames": "messages",
    "too_many_segments": "messages",
    "bad_segments": "messages",
    "invalid_messages": "messages",
    "invalid_media_url": "messages",
    "mismatched_model": "model",
    "invalid_custom_id": "custom_id",
    "duplicate_custom_id": "custom_id",
    "invalid_method": "method",
    "invalid_url": "url",
    "invalid_body": "body",
}
_NEVER_RAN: Final[Mapping[ItemState, tuple[str, str]]] = {
    ItemState.CANCELLED: ("batch_cancelled", "The batch was cancelled before this request ran."),
    ItemState.EXPIRED: (
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
}


_ADDITIONS: Final = ("images", "media", "flags", "stamp")
"""Of an item's details, those that a line shows beside what OpenAI's have."""


def is_output(item: Ended) -> bool:
    """Whether its line stands in the output file; all others stand in the errors file."""
    return item.state is ItemState.COMPLETED


def build_line(job: JobId, model: str, item: Ended, parts: Sequence[Answer] = ()) -> dict[str, Any]:
    """
    One line of `output.jsonl` or `errors.jsonl`.

    Args:
        parts: the item's, also of one that failed or never came to its end.
    """
    name = f"{job.hex}{item.line:08x}"
    line: dict[str, Any] = {
        "id": f"batch_req_{name}",
        "custom_id": item.custom_id,
        "response": None,
        "error": None,
    }
    if parts:
        line["parts"] = build_parts(parts)
    if item.state in _NEVER_RAN:
        code, message = _NEVER_RAN[item.state]
        line["error"] = {"code": code, "message": message}
        return line
    status, body = 200, build_completion(job, model, item)
    if item.state is ItemState.FAILED:
        status, body = build_error(item.error_code or "internal_error", item.error_message or "")
    line["response"] = {"status_code": status, "request_id": f"req_{name}", "body": body}
    details = item.details or {}
    line.update({key: details[key] for key in _ADDITIONS if details.get(key)})
    return line


def build_parts(parts: Sequence[Answer]) -> list[dict[str, Any]]:
    """The parts of an item, by number: what each is about, and its text or its error."""
    return [_build_part(part) for part in parts]


def _build_part(part: Answer) -> dict[str, Any]:
    built: dict[str, Any] = {"number": part.number}
    images = [dict(image) for image in part.images]
    if part.start_s is not None:
        built |= {"start_s": part.start_s, "end_s": part.end_s, "frame_times_s": None}
        for image in images:
            if image["kind"] == "video":  # there is one
                built["frame_times_s"] = image.pop("times_s")
    built |= {"text": part.text, "finish_reason": part.finish_reason}
    if part.error_code is not None:
        built["error"] = {"code": part.error_code, "message": part.error_message}
    if images:
        built["images"] = images
    return built


def build_completion(job: JobId, model: str, item: Ended) -> dict[str, Any]:
    """The body of a chat completion, for a completed item."""
    details = item.details or {}
    outputs = details.get("outputs") or [
        {"text": item.text or "", "finish_reason": item.finish_reason}
    ]
    num_prompt_tokens = item.num_prompt_tokens or 0
    num_completion_tokens = item.num_completion_tokens or 0
    return {
        "id": f"chatcmpl-{job.hex}{item.line:08x}",
        "object": "chat.completion",
        "created": int(item.ended_at),
        "model": model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": output["text"]},
                "logprobs": None,
                "finish_reason": _as_wire_reason(output["finish_reason"]),
            }
            for index, output in enumerate(outputs)
        ],
        "usage": {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_completion_tokens,
            "total_tokens": num_prompt_tokens + num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": item.num_cached_tokens or 0},
        },
    }


def build_error(code: str, message: str) -> tuple[int, dict[str, Any]]:
    """The status and the error envelope of an item that failed."""
    is_server = code in _SERVER_CODES
    return 500 if is_server else 400, {
        "error": {
            "message": message,
            "type": "server_error" if is_server else "invalid_request_error",
            "param": _PARAMS.get(code),
            "code": code,
        }
    }


def encode_line(line: Mapping[str, Any]) -> bytes:
    return (
        json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        + b"\n"
    )


def _as_wire_reason(reason: str | None) -> str:
    # The wire knows no other word for a text that was ended because it went in circles.
    return "stop" if reason == "repetition" else reason or "stop"
