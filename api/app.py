"""Builds the app: routes, errors, and what they stand on. What happens after a commit comes from outside."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib import metadata

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from api import batches, chat, errors, files, health, jobs, models
from api.bodies import HeldBytes
from api.config import ApiConfig
from api.edge import Edge
from api.metrics import Metrics
from api.services import Notify, Ping, Services
from api.watch import Watcher
from storage.blobs import Blobs
from storage.db import Database
from storage.ids import JobId


def _tell_nobody(job: JobId) -> None:
    """A sweep finds the job by itself, a little later."""


def create_app(
    config: ApiConfig,
    database: Database,
    blobs: Blobs,
    *,
    notify_created: Notify = _tell_nobody,
    notify_chat_created: Notify = _tell_nobody,
    notify_cancelled: Notify = _tell_nobody,
    pings: Mapping[str, Ping] | None = None,
) -> FastAPI:
    """
    Args:
        notify_created, notify_chat_created, notify_cancelled: called in a thread, after the commit;
            they should be quick, and may fail: then the job waits for the next sweep.
        pings: of dependencies beside the database and the blobs, for readiness.
    """
    metrics = Metrics()
    services = Services(
        config=config,
        database=database,
        blobs=blobs,
        notify_created=notify_created,
        notify_chat_created=notify_chat_created,
        notify_cancelled=notify_cancelled,
        metrics=metrics,
        watcher=Watcher(database),
        held=HeldBytes(config.max_held_bytes),
        pings=dict(pings or {}),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await services.watcher.close()

    # FastAPI's own page would load its scripts from a public network.
    app = FastAPIOffline(
        title="Darkroom",
        version=metadata.version("darkroom"),
        description="Batch inference for vision-language models, on OpenAI's Files and Batches wire.",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would have no envelope, and lose a POST's body
        redoc_url=None,
    )
    app.state.services = services
    errors.install(app)
    for room in (files, batches, jobs, chat, models, health):
        app.include_router(room.router)
    app.add_middleware(Edge, metrics=metrics)
    return app
