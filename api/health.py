"""
Are we alive; does each dependency answer; what is there to measure.

Liveness asks nothing but this process: restarting it cures no database. Readiness and metrics name
dependencies and counts only.
"""

import asyncio
import ipaddress
from typing import Any, Final

import structlog
from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from api.answers import ERRORS, answer_json
from api.auth import check_origin
from api.config import ApiConfig
from api.errors import ForbiddenError, UnavailableError
from api.metrics import CONTENT_TYPE
from api.services import Here, Ping

log = structlog.get_logger()
router = APIRouter(tags=["Health"])

PING_TIMEOUT_S: Final = 2.0

_TEXT: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {"text/plain": {}}, "description": "Prometheus' text format"},
    403: ERRORS[403],
    503: ERRORS[503],
}


@router.get("/healthz")
async def show_liveness() -> Response:
    return answer_json({"status": "alive"})


@router.get("/readyz", responses={503: ERRORS[503]})
async def show_readiness(here: Here) -> Response:
    """Whether every dependency answers; 503 names those that do not."""
    pings = {"database": here.database.ping, "blobs": here.blobs.ping, **here.pings}
    answers = await asyncio.gather(*(_ping(name, ping) for name, ping in pings.items()))
    silent = [name for name, is_there in zip(pings, answers, strict=True) if not is_there]
    if silent:
        raise UnavailableError(f"No answer from: {', '.join(silent)}.", code="not_ready")
    return answer_json({"status": "ready", "checks": dict.fromkeys(pings, "ok")})


async def _ping(name: str, ping: Ping) -> bool:
    try:
        await asyncio.wait_for(run_in_threadpool(ping), PING_TIMEOUT_S)
    except Exception as error:  # noqa: BLE001 - whatever a dependency raises, it is not ready
        log.warning("ping_failed", dependency=name, error=type(error).__name__)
        return False
    return True


@router.get("/metrics", response_class=Response, responses=_TEXT)
def show_metrics(request: Request, here: Here) -> Response:
    """For a Prometheus that is known. What came through a proxy is refused: counts tell of others."""
    if not _is_known(request, here.config):
        raise ForbiddenError("Metrics are for this host and the networks that were named only.")
    if here.config.is_open:
        check_origin(request)
    return Response(here.metrics.expose(here.database), media_type=CONTENT_TYPE)


def _is_known(request: Request, config: ApiConfig) -> bool:
    if request.client is None or {"forwarded", "x-forwarded-for"} & set(request.headers):
        return False
    try:
        address = ipaddress.ip_address(request.client.host)
    except ValueError:
        return False
    if address.version == 6 and address.ipv4_mapped is not None:  # a socket for both protocols
        address = address.ipv4_mapped
    return address.is_loopback or any(address in network for network in config.metrics_from)
