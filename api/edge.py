"""
The edge of the room: every request passes here first, and every answer last.

It gives the request its id, counts and logs it, and answers for what nobody else has caught. It is
plain ASGI, because the framework's own last handler stands outside of its middleware: an answer
from there would carry no id.
"""

import secrets
import time
from typing import Final

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import FailedInternallyError, InvalidRequestError, build_answer
from api.metrics import Metrics

log = structlog.get_logger()

_TWO_LENGTHS: Final = InvalidRequestError(
    "The request has both a Content-Length and a Transfer-Encoding.",
    headers={"connection": "close"},
)
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Edge:
    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(16)}"
        started = time.perf_counter()
        status = 0

        async def send_stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        with structlog.contextvars.bound_contextvars(request=request_id):
            try:
                await self._choose(scope)(scope, receive, send_stamped)
            except ClientDisconnect:
                pass  # nobody is left to be told
            except Exception:  # the edge of the process: the client gets an envelope, we the trace
                log.exception("request_crashed")
                if status:
                    raise  # too late for an envelope; the server cuts the connection
                await build_answer(FailedInternallyError())(scope, receive, send_stamped)
            finally:
                seconds = time.perf_counter() - started
                method = scope["method"] if scope["method"] in _METHODS else "OTHER"
                route = getattr(scope.get("route"), "path", "unmatched")
                self._metrics.count_request(method, route, status, seconds)
                log.info(
                    "request_answered",
                    method=method,
                    route=route,
                    status=status,
                    ms=round(seconds * 1000, 1),
                )

    def _choose(self, scope: Scope) -> ASGIApp:
        """A proxy before us may see the end of such a body elsewhere, and what follows as a request."""
        names = {name for name, _ in scope["headers"]}
        if {b"content-length", b"transfer-encoding"} <= names:
            return build_answer(_TWO_LENGTHS)
        return self._app
