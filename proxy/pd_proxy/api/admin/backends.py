"""/admin/backends: the state of each backend, and draining.

A backend's id is its host and port (`10.0.0.1:8000`), where its URL has nothing else. Otherwise (https, a path, an
IPv6 address) the id is the host and a short hash of the URL. Both depend on the URL alone, so an id is the same in
every gateway and after every restart. The percent-encoded URL is accepted in the place of an id.
"""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends
from starlette.convertors import Convertor, register_url_convertor

from pd_proxy.api.credentials import Credentials
from pd_proxy.api.operations import operator
from pd_proxy.errors import BackendNotFound
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.settings.addresses import backend_url

_HASH_LENGTH = 8  # hexadecimal digits: enough for thousands of backends of one host


def backend_id(url: str) -> str:
    """The id of a backend, from its normalised URL. Safe as a segment of a path."""
    plain = url.removeprefix("http://")
    if re.fullmatch(r"[a-z0-9.-]+(:[0-9]+)?", plain):
        return plain
    host = re.sub(r"[^a-z0-9.]+", "-", urlsplit(url).hostname or "").strip("-")
    digest = hashlib.sha256(url.encode()).hexdigest()
    return f"{host}-{digest[:_HASH_LENGTH]}"


def find_backend(fleet: Fleet, name: str) -> Backend:
    """The backend with an id or URL.

    Raises:
        BackendNotFound: there is none.
    """
    try:
        url = backend_url(name)
    except ValueError:
        url = ""
    for backend in fleet:
        if backend.url == url or backend_id(backend.url) == name:
            return backend
    raise BackendNotFound(
        f"there is no backend {name[:256]!r} in this gateway; GET /admin/backends lists them", param="name"
    )


def handoff_shown(backend: Backend) -> dict[str, Any]:
    """The last result of a backend's hand-offs, for the routes' answers."""
    last = backend.handoff
    return {
        "state": last.state,
        "ever": backend.handed_over,
        "with": last.peer or None,
        "at": time_of_day(last.at) if last.at else None,
        "code": last.finding.code if last.finding else None,
        "reason": last.finding.what if last.finding else None,
        "advice": last.finding.advice if last.finding else None,
    }


def time_of_day(at: float, precision: str = "seconds") -> str:
    """A time of `time.monotonic` as date and time (ISO 8601, UTC)."""
    return (datetime.now(UTC) - timedelta(seconds=monotonic() - at)).isoformat(timespec=precision)


class _Name(Convertor[str]):
    """A backend's id or URL in a path; `/drain` and `/undrain` at the end are not part of it."""

    regex = r"(?:(?!/(?:un)?drain$).)+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("backend", _Name())


def shown(fleet: Fleet, backend: Backend) -> dict[str, Any]:
    """The description of a backend in the routes' answers."""
    return {
        "id": backend_id(backend.url),
        "role": backend.role,
        "kind": backend.kind.name,
        "url": backend.url,
        "group": backend.group,
        "connector": backend.connector,
        "state": fleet.state(backend),
        "up": backend.up,
        "reason": backend.reason,
        "draining": backend.draining,
        "drained": backend.drained,
        "removed": backend.removed,
        "ejected": {
            leg: {"seconds_left": round(seconds, 3), "reason": reason}
            for leg, (seconds, reason) in fleet.outlier_detector.ejected_for(backend).items()
        },
        "slow_start": round(backend.factor, 3) if backend.factor < 1 else None,
        "inflight_requests": backend.inflight_requests,
        "inflight_tokens": backend.inflight_tokens,
        "open_handoffs": backend.open_handoffs,
        "models": sorted(backend.models) if backend.models is not None else None,
        "version": backend.version,
        "handoff": handoff_shown(backend) if backend.role in ("prefill", "decode") else None,
    }


def backends(fleet: Fleet, credentials: Credentials) -> APIRouter:
    """The routes, for operators."""
    router = APIRouter(prefix="/admin/backends", tags=["administration"], dependencies=[Depends(operator(credentials))])

    @router.get("")
    async def list_backends() -> dict[str, Any]:
        """Every backend and its state. `handoff` is the last result of its hand-offs. `ejected` has the seconds that an
        ejection still lasts; `slow_start` is the share of its usual load that a backend gets after its return."""
        return {"backends": [shown(fleet, backend) for backend in fleet]}

    @router.get("/{name:backend}")
    async def one_backend(name: str) -> dict[str, Any]:
        """One backend and its state."""
        return shown(fleet, find_backend(fleet, name))

    @router.post("/{name:backend}/drain")
    async def drain(name: str) -> dict[str, Any]:
        """Send a backend no new requests; those that it has are finished. `drained` turns true when nothing needs the
        backend any more: no leg runs there, and decode has read all hand-offs of it."""
        backend = find_backend(fleet, name)
        fleet.drain(backend)
        return shown(fleet, backend)

    @router.post("/{name:backend}/undrain")
    async def undrain(name: str) -> dict[str, Any]:
        """Send a backend requests again."""
        backend = find_backend(fleet, name)
        fleet.undrain(backend)
        return shown(fleet, backend)

    return router
