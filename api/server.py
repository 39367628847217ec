"""Runs the app under uvicorn: what `darkroom api` ends in."""

import socket
from typing import Final

import uvicorn
from fastapi import FastAPI

from api.config import ApiConfig, check_binding
from api.services import Services

DRAIN_S: Final = 10
"""How long answers that are under way may take once the server is told to stop."""


class Server(uvicorn.Server):
    """Lets waiting polls go when it is told to stop; other answers have `DRAIN_S` to come to their end."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._services.watcher.let_polls_go()
        await super().shutdown(sockets)


def build_server(app: FastAPI, config: ApiConfig, *, host: str, port: int) -> uvicorn.Server:
    """
    Raises:
        BadApiConfigError: open, and not on a loopback address.
    """
    check_binding(host, config)
    return Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,  # the process that starts us decides how it logs
            access_log=False,  # the edge logs each request, without query strings
            server_header=False,
            proxy_headers=False,  # whoever is asked from a proxy must not look like this host
            timeout_graceful_shutdown=DRAIN_S,
            lifespan="on",
        ),
        app.state.services,
    )
