"""What the room is told when it starts: limits, models and who may come in. Read from nowhere here."""

import ipaddress
from dataclasses import dataclass, field
from typing import Final

MEBIBYTE: Final = 1024 * 1024
MIN_WINDOW_S: Final = 10 * 60
MAX_WINDOW_S: Final = 30 * 24 * 3600

LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class BadApiConfigError(ValueError):
    """The API cannot be started like this."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that some worker is meant to run; what `/v1/models` shows."""

    id: str
    created_at: int = 0
    owned_by: str = "darkroom"


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """
    Args:
        pepper: what hashes of API keys are made with; the same in every process of a service.
        is_open: answer requests without a key as the tenant `open_tenant`. For a service that only
            its own host can reach: see `check_binding`.
        models: known models; a batch may name others, and then waits for a worker that runs them.
        max_file_bytes: of one upload.
        max_batch_bytes, max_batch_lines: of the input of one batch. More makes the batch `failed`.
        max_body_bytes: of a JSON body, inline requests included; it is held in memory.
        max_held_bytes: of all JSON bodies that are held at a time.
        body_timeout_s: how long the next piece of a body may take to come.
        max_open_items, max_open_bytes: what a tenant may have open where its row does not say.
        batch_file_lifetime_s: of uploads for batches that do not say when they expire.
        metrics_from: networks that may read /metrics, besides this host.
        chat_timeout_s: how long a chat completion may take, queue included.
    """

    pepper: bytes
    is_open: bool = False
    open_tenant: str = "default"
    models: tuple[ServedModel, ...] = ()
    max_file_bytes: int = 512 * MEBIBYTE
    max_batch_bytes: int = 200 * MEBIBYTE
    max_batch_lines: int = 50_000
    max_body_bytes: int = 32 * MEBIBYTE
    max_held_bytes: int = 256 * MEBIBYTE
    body_timeout_s: float = 60.0
    max_open_items: int | None = None
    max_open_bytes: int | None = None
    batch_file_lifetime_s: int = 30 * 24 * 3600
    metrics_from: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()
    chat_timeout_s: float = 300.0
    model_ids: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        if not self.is_open and len(self.pepper) < 16:
            raise BadApiConfigError("The pepper for API keys needs 16 bytes or more.")
        object.__setattr__(self, "model_ids", frozenset(model.id for model in self.models))


def check_binding(host: str, config: ApiConfig) -> None:
    """
    Refuse to listen beyond this host while requests need no key.

    Raises:
        BadApiConfigError: `host` is no loopback address.
    """
    if config.is_open and not is_loopback(host):
        raise BadApiConfigError(
            f"Without API keys the server listens on a loopback address only, not on {host}. "
            "Make a key with `darkroom keys create`, or listen on 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    """Whether only this host can reach a server that listens there."""
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
