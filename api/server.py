"""Runs the app under uvicorn: what `darkroom api` ends in."""

from typing import Final

import uvicorn
from fastapi import FastAPI

from api.config import ApiConfig, check_binding

DRAIN_S: Final = 10
"""How long answers that are under way may take once the server is told to stop."""


def build_server(app: FastAPI, config: ApiConfig, *, host: str, port: int) -> uvicorn.Server:
    """
    Raises:
        BadApiConfigError: open, and not on a loopback address.
    """
    check_binding(host, config)
    return uvicorn.Server(
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
        )
    )
