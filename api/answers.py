"""JSON answers with their headers, and what every route says about its errors at /docs."""

from collections.abc import Mapping
from typing import Any, Final

import orjson
from fastapi import Response

from api.schemas import ErrorEnvelope

# Each status that has a meaning of its own; anything else of the framework's has the same envelope.
ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorEnvelope, "description": text}
    for status, text in {
        400: "The request is not understood",
        401: "No valid API key",
        403: "Not from there",
        404: "There is nothing under this id",
        408: "The body stalled",
        409: "It contradicts what is there",
        413: "Too large",
        429: "Over a limit",
        503: "Try again",
    }.items()
}


def answer_json(
    content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(
        orjson.dumps(content), status, media_type="application/json", headers=dict(headers or {})
    )


def describe_json(model: type[Any]) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model}, **ERRORS}


def describe_body(model: type[Any]) -> dict[str, Any]:
    """For bodies that a route reads by itself: the whole schema in its place, pointing nowhere."""
    schema = model.model_json_schema()
    schema = _inline(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inline(schema: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inline(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    return {name: _inline(part, definitions) for name, part in schema.items()}
