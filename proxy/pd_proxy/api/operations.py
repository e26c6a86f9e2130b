"""The routes for people and machines that run the gateway: probes, models, metrics, and the script's own endpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, generate_latest
from prometheus_client.metrics_core import Metric
from pydantic import BaseModel, ConfigDict

from pd_proxy import __version__
from pd_proxy.admission.admission import Admission
from pd_proxy.admission.gate import Gate
from pd_proxy.api.credentials import Credentials
from pd_proxy.errors import InvalidRequest, NoBackend
from pd_proxy.fleet.backend import ROLES, Role
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.model_names import Names
from pd_proxy.fleet.readiness import not_ready, readiness
from pd_proxy.settings.addresses import backend_url
from pd_proxy.settings.engines import DEFAULT_GROUP
from pd_proxy.workers.metrics_merge import merge, parse
from pd_proxy.workers.peers import PeerWorkers


class Instances(BaseModel):
    """The body of /instances/add and /instances/remove."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["prefill", "decode", "mixed", "encode"]
    instances: str | list[str]
    group: str = DEFAULT_GROUP


def probes(fleet: Fleet, gate: Gate, peers: PeerWorkers | None = None) -> APIRouter:
    """/health: the process is alive. /ready: it could serve a request now, whichever worker gets it."""
    router = APIRouter(tags=["probes"])

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Alive, whatever the backends do."""
        return {"status": "alive"}

    @router.get("/ping")
    @router.post("/ping")
    async def ping() -> dict[str, str]:
        """As /health, for SageMaker."""
        return {"status": "alive"}

    @router.get("/ready")
    async def ready() -> dict[str, Any]:
        """200 when one prefill and one decode backend that match are up and have handed over, or one mixed is up; else
        503 with the reason. Of several groups one has to be ready; `groups` says what the others lack."""
        if gate.draining:
            raise NoBackend("the gateway is shutting down", retry_after=1)
        reason = not_ready(fleet)
        if peers is not None:
            reason = reason or await peers.not_ready()
        if reason:
            raise NoBackend(reason, retry_after=1)
        lacking = readiness(fleet)
        if len(lacking) < 2:
            return {"status": "ready"}
        return {"status": "ready", "groups": {name: missing or "ready" for name, missing in lacking.items()}}

    @router.get("/healthcheck")
    async def healthcheck() -> dict[str, Any]:
        """As the example script answers it: counts, and always 200."""
        return {
            "status": "ok",
            "prefill_instances": len(fleet.pool("prefill")),
            "decode_instances": len(fleet.pool("decode")),
            "request_num": gate.inside,
        }

    return router


class Engines(BaseModel):
    """Backends of one pool, kind and version."""

    role: Role
    kind: str
    version: str
    count: int


class Versions(BaseModel):
    """The answer of /version."""

    version: str
    backends: list[Engines]


class PoolLoad(BaseModel):
    """One pool: its backends, those that are up, and what is in flight there."""

    backends: int
    up: int
    requests: int
    tokens: int


class Load(BaseModel):
    """The answer of /load. `server_load` is vLLM's: requests that have begun and not ended."""

    server_load: int
    waiting: int
    pools: dict[Role, PoolLoad]


def client(credentials: Credentials) -> Callable[[Request], Awaitable[None]]:
    """What lets only clients through."""

    async def check(request: Request) -> None:
        headers = request.headers
        credentials.check_client(
            headers.get("authorization", "").encode("latin-1"), headers.get("x-api-key", "").encode("latin-1")
        )

    return check


def service(fleet: Fleet, gate: Gate, admission: Admission, credentials: Credentials) -> APIRouter:
    """/version and /load, as of one engine: of the gateway with all that is behind it, without its addresses."""
    router = APIRouter(tags=["service"], dependencies=[Depends(client(credentials))])

    @router.get("/version")
    async def version() -> Versions:
        """The gateway's version, and those of the engines behind it."""
        counted = Counter((backend.role, backend.kind.name, backend.version) for backend in fleet)
        engines = [
            Engines(role=role, kind=kind, version=named, count=count) for (role, kind, named), count in counted.items()
        ]
        return Versions(version=__version__, backends=engines)

    @router.get("/load")
    async def load() -> Load:
        """How much there is to do now, in all and in each pool. Tokens are estimates."""
        pools = {
            role: PoolLoad(
                backends=len(pool),
                up=sum(backend.up for backend in pool),
                requests=sum(backend.inflight_requests for backend in pool),
                tokens=sum(backend.inflight_tokens for backend in pool),
            )
            for role in ROLES
            if (pool := fleet.pool(role))
        }
        return Load(server_load=gate.inside, waiting=admission.waiting, pools=pools)

    return router


def models(fleet: Fleet, names: Names, credentials: Credentials) -> APIRouter:
    """/v1/models, from what the backends say, and the aliases."""
    router = APIRouter(tags=["models"], dependencies=[Depends(client(credentials))])

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """Every model that can be asked for."""
        if cards := names.cards():
            return {"object": "list", "data": cards}
        raise NoBackend(
            not_ready(fleet) or "no backend has named a model",
            retry_after=1,
        )

    @router.get("/v1/models/{model:path}")
    async def one_model(model: str) -> dict[str, Any]:
        """One of them."""
        return await names.card(model)

    return router


class _Page:
    """What several workers have to show, as encoders want it."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def metrics(
    registry: CollectorRegistry, peers: PeerWorkers | None = None, *, remembers: Callable[[str], None] | None = None
) -> APIRouter:
    """/metrics, as Prometheus text or, when asked for, OpenMetrics; of all workers, where there are several.

    Arguments:
        remembers: is told what this worker has shown.
    """
    router = APIRouter(tags=["metrics"])

    @router.get("/metrics", response_class=Response)
    async def scrape(request: Request) -> Response:
        """What the gateway saw."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        shown: Any = registry
        if remembers is not None:
            remembers(generate_latest(registry).decode())
        if peers is not None:
            pages = [*await peers.metrics(), peers.departed()]
            own = generate_latest(registry).decode()
            peers.remember(own)
            shown = _Page(merge(map(parse, [own, *pages])))
        return Response(encode(shown), headers={"content-type": content_type})

    return router


def operator(credentials: Credentials) -> Callable[[Request], Awaitable[None]]:
    """What lets only operators through."""

    async def check(request: Request) -> None:
        credentials.check_operator(request.scope)

    return check


def administration(fleet: Fleet, credentials: Credentials) -> APIRouter:
    """What changes the pools: by the admin key, or at the admin socket."""

    router = APIRouter(tags=["administration"], dependencies=[Depends(operator(credentials))])

    @router.post("/instances/add")
    async def add(change: Instances) -> dict[str, Any]:
        """Add backends, to the group that is named or to the default one. Each joins the rotation when its first health
        check passes."""
        given = _urls(change)
        if change.group not in fleet.groups:
            known = ", ".join(fleet.groups)
            raise InvalidRequest(f"there is no group {change.group[:64]!r}; the settings have {known}", param="group")
        for url in given:
            if other := _other_place(fleet, url, change.type, change.group):
                raise InvalidRequest(f"{url} is already {other}; remove it there first", param="instances")
        for url in given:
            fleet.add(url, change.type, change.group)
        return _membership(fleet, f"Added {change.type} instances: {', '.join(map(_short, given))}.")

    @router.post("/instances/remove")
    async def remove(change: Instances) -> dict[str, Any]:
        """Drain backends, then forget them. What they are doing is finished; nothing new goes there."""
        given = _urls(change)
        missing = [url for url in given if fleet.find(url, change.type) is None]
        if missing:
            raise InvalidRequest(
                f"no such {change.type} instance: {', '.join(map(_short, missing))}", param="instances"
            )
        for url in given:
            fleet.remove(url, change.type)
        return _membership(fleet, f"Removed {change.type} instances: {', '.join(map(_short, given))}.")

    return router


def _membership(fleet: Fleet, message: str) -> dict[str, Any]:
    """The answer of the example script: its message, and the pools."""
    return {
        "message": message,
        "current_prefill_instances": [_short(b.url) for b in fleet.pool("prefill") if not b.removed],
        "current_decode_instances": [_short(b.url) for b in fleet.pool("decode") if not b.removed],
    }


def _urls(change: Instances) -> list[str]:
    """The instances that are named, each as a URL in its one form."""
    given = [change.instances] if isinstance(change.instances, str) else change.instances
    try:
        return [backend_url(instance) for instance in given]
    except ValueError as error:
        raise InvalidRequest(str(error), param="instances") from None


def _other_place(fleet: Fleet, url: str, role: Role, group: str) -> str:
    """The role and group that a backend has already, where these are others; else empty."""
    found = next((b for b in fleet if b.url == url and (b.role, b.group) != (role, group)), None)
    if found is None:
        return ""
    return f"a {found.role} backend" + (f" of group {found.group}" if found.group != group else "")


def _short(url: str) -> str:
    """host:port, as the example script names its instances."""
    return url.removeprefix("http://")
