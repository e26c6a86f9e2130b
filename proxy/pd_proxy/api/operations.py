"""The routes for running a gateway: probes, models, versions, load, metrics, and the example script's own routes."""

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
    """The routes of the probes. /health: the process is alive. /ready: every worker could serve a request now."""
    router = APIRouter(tags=["probes"])

    @router.get("/health")
    async def health() -> dict[str, str]:
        """200 while the process is alive, whatever the state of the backends."""
        return {"status": "alive"}

    @router.get("/ping")
    @router.post("/ping")
    async def ping() -> dict[str, str]:
        """The same as /health, for SageMaker."""
        return {"status": "alive"}

    @router.get("/ready")
    async def ready() -> dict[str, Any]:
        """200 when a prefill and a decode backend that match are up and have completed a hand-off, or a mixed backend
        is up; else 503 with the reason. Of several groups, one has to be ready; `groups` shows what the others lack."""
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
        """The example script's health check: the sizes of the pools, and always 200."""
        return {
            "status": "ok",
            "prefill_instances": len(fleet.pool("prefill")),
            "decode_instances": len(fleet.pool("decode")),
            "request_num": gate.inside,
        }

    return router


class Engines(BaseModel):
    """How many backends of one pool, kind and version there are."""

    role: Role
    kind: str
    version: str
    count: int


class Versions(BaseModel):
    """The answer of /version."""

    version: str
    backends: list[Engines]


class PoolLoad(BaseModel):
    """One pool: how many backends it has, how many are up, and what is in flight there."""

    backends: int
    up: int
    requests: int
    tokens: int


class Load(BaseModel):
    """The answer of /load. `server_load` is vLLM's name for the requests in progress."""

    server_load: int
    waiting: int
    pools: dict[Role, PoolLoad]


def client(credentials: Credentials) -> Callable[[Request], Awaitable[None]]:
    """A dependency that admits only clients."""

    async def check(request: Request) -> None:
        headers = request.headers
        credentials.check_client(
            headers.get("authorization", "").encode("latin-1"), headers.get("x-api-key", "").encode("latin-1")
        )

    return check


def service(fleet: Fleet, gate: Gate, admission: Admission, credentials: Credentials) -> APIRouter:
    """The routes /version and /load, which engines have too. They cover all backends, and show no addresses."""
    router = APIRouter(tags=["service"], dependencies=[Depends(client(credentials))])

    @router.get("/version")
    async def version() -> Versions:
        """The version of the gateway, and the versions of its engines."""
        counted = Counter((backend.role, backend.kind.name, backend.version) for backend in fleet)
        engines = [
            Engines(role=role, kind=kind, version=named, count=count) for (role, kind, named), count in counted.items()
        ]
        return Versions(version=__version__, backends=engines)

    @router.get("/load")
    async def load() -> Load:
        """The load now, in total and of each pool. Tokens are estimates."""
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
    """The route /v1/models: the models of the backends, and the aliases."""
    router = APIRouter(tags=["models"], dependencies=[Depends(client(credentials))])

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """Every model that clients can use."""
        if cards := names.cards():
            return {"object": "list", "data": cards}
        raise NoBackend(
            not_ready(fleet) or "no backend has named a model",
            retry_after=1,
        )

    @router.get("/v1/models/{model:path}")
    async def one_model(model: str) -> dict[str, Any]:
        """One model."""
        return await names.card(model)

    return router


class _MergedMetrics:
    """The metrics of several workers, in the form that the encoders take."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def metrics(
    registry: CollectorRegistry, peers: PeerWorkers | None = None, *, remembers: Callable[[str], None] | None = None
) -> APIRouter:
    """The route /metrics: Prometheus's text format or, where the client accepts it, OpenMetrics. With several workers
    it shows the metrics of all.

    Arguments:
        remembers: called with the page that this worker has shown.
    """
    router = APIRouter(tags=["metrics"])

    @router.get("/metrics", response_class=Response)
    async def scrape(request: Request) -> Response:
        """The gateway's metrics."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        shown: Any = registry
        if remembers is not None:
            remembers(generate_latest(registry).decode())
        if peers is not None:
            pages = [*await peers.metrics(), peers.departed()]
            own = generate_latest(registry).decode()
            peers.remember(own)
            shown = _MergedMetrics(merge(map(parse, [own, *pages])))
        return Response(encode(shown), headers={"content-type": content_type})

    return router


def operator(credentials: Credentials) -> Callable[[Request], Awaitable[None]]:
    """A dependency that admits only operators."""

    async def check(request: Request) -> None:
        credentials.check_operator(request.scope)

    return check


def administration(fleet: Fleet, credentials: Credentials) -> APIRouter:
    """The routes that change the pools, for operators."""

    router = APIRouter(tags=["administration"], dependencies=[Depends(operator(credentials))])

    @router.post("/instances/add")
    async def add(change: Instances) -> dict[str, Any]:
        """Add backends to the named group, or to the default group. Each gets requests as soon as its first health
        check has passed."""
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
        """Drain backends, then remove them. They get no new requests, and those that they have are finished."""
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
    """The example script's answer: a message, and the pools."""
    return {
        "message": message,
        "current_prefill_instances": [_short(b.url) for b in fleet.pool("prefill") if not b.removed],
        "current_decode_instances": [_short(b.url) for b in fleet.pool("decode") if not b.removed],
    }


def _urls(change: Instances) -> list[str]:
    """The normalised URLs of the named instances."""
    given = [change.instances] if isinstance(change.instances, str) else change.instances
    try:
        return [backend_url(instance) for instance in given]
    except ValueError as error:
        raise InvalidRequest(str(error), param="instances") from None


def _other_place(fleet: Fleet, url: str, role: Role, group: str) -> str:
    """The role and group that a backend has already, where they differ from these; else empty."""
    found = next((b for b in fleet if b.url == url and (b.role, b.group) != (role, group)), None)
    if found is None:
        return ""
    return f"a {found.role} backend" + (f" of group {found.group}" if found.group != group else "")


def _short(url: str) -> str:
    """host:port, as the example script names its instances."""
    return url.removeprefix("http://")
