"""What the routes stand on. Made by `create_app`, found again through the request."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import structlog
from fastapi import Depends, Request

from api.bodies import HeldBytes
from api.config import ApiConfig
from api.metrics import Metrics
from api.watch import Watcher
from storage.blobs import Blobs
from storage.db import Database
from storage.ids import JobId

log = structlog.get_logger()

Notify = Callable[[JobId], object]
Ping = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Services:
    """
    Args:
        notify_created: called after the commit that made a job; sends what gets it going.
        notify_chat_created: the same for a job of the fast lane.
        notify_cancelled: called after the commit that cancelled one.
        pings: by name, for readiness; each raises unless its dependency answers.
    """

    config: ApiConfig
    database: Database
    blobs: Blobs
    notify_created: Notify
    notify_chat_created: Notify
    notify_cancelled: Notify
    metrics: Metrics
    watcher: Watcher
    held: HeldBytes
    pings: Mapping[str, Ping] = field(default_factory=dict)

    def tell_created(self, job: JobId) -> None:
        _tell(self.notify_created, job)

    def tell_chat_created(self, job: JobId) -> None:
        _tell(self.notify_chat_created, job)

    def tell_cancelled(self, job: JobId) -> None:
        _tell(self.notify_cancelled, job)


def _tell(notify: Notify, job: JobId) -> None:
    try:
        notify(job)
    except Exception as error:
        log.warning("notify_failed", job=str(job), exc_info=error)


async def _find_services(request: Request) -> Services:  # or it would be a trip through a thread
    services: Services = request.app.state.services
    return services


Here = Annotated[Services, Depends(_find_services)]
