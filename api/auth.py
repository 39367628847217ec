"""
Who asks: an API key leads to its tenant, and to nothing of any other.

An open service needs no key and takes everybody for one tenant. It is meant for one person on one
host, so it also refuses what a web page in that person's browser could send: names that are not
this host's (DNS rebinding) and other origins.
"""

from dataclasses import dataclass
from typing import Annotated, Final
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.config import LOOPBACK_NAMES
from api.errors import ForbiddenError, UnauthenticatedError
from api.services import Here, Services
from storage import tenants
from storage.ids import TenantId

_KEY_PREFIX: Final = "dk_"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is. `api_key_id` is None where no key was needed."""

    tenant: TenantId
    api_key_id: str | None


# Only describes the scheme at /docs: what it finds, and how it would complain, is not ours.
Described = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def admit(request: Request, services: Here, _shown: Described = None) -> Caller:
    """
    Look up who asks. It waits for the database: not on the server's loop.

    Raises:
        UnauthenticatedError: no key, or one that is malformed, unknown, revoked or expired; the
            text is the same for all of them.
        ForbiddenError: an open service is asked by another host's page.
    """
    key = _read_key(request)
    if services.config.is_open:
        check_origin(request)
        # OpenAI's client cannot do without a key. One that is not ours stands for none.
        if key is None or not key.startswith(_KEY_PREFIX):
            return Caller(_open_tenant(services), None)
    if key is None:
        raise UnauthenticatedError
    with services.database.read() as session:
        tenant = tenants.find_by_key(session, key, pepper=services.config.pepper)
    if tenant is None:
        raise UnauthenticatedError
    return Caller(tenant.id, key.split("_")[1])


Asker = Annotated[Caller, Depends(admit)]


def _read_key(request: Request) -> str | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _open_tenant(services: Services) -> TenantId:
    name = services.config.open_tenant
    with services.database.read() as session:
        found = tenants.find(session, name)
    if found is None:
        with services.database.write() as session:
            found = tenants.get_or_create(session, name)
    return found.id


def check_origin(request: Request) -> None:
    """Raises `ForbiddenError` for another host's name, and for what its pages send."""
    try:
        host = urlsplit(f"//{request.headers.get('host', '')}")
        origin = request.headers.get("origin")
        is_own_page = origin is None or urlsplit(origin).netloc == host.netloc
        is_own_host = host.hostname in LOOPBACK_NAMES
    except ValueError:  # brackets that do not match, and the like
        is_own_page = is_own_host = False
    if not (is_own_host and is_own_page):
        raise ForbiddenError("Without API keys this server answers its own host only.")
