"""What operators have the engines do, all of them or some: the cache's reset, the profiler, sleep and waking.

Each call goes to the path that the backend's kind has for it, with the parameters that are named here and no others;
the answer says of each backend how it went. A backend is put to sleep only when nothing needs it: it is drained first,
and is down, as its prober sees it, until it has been woken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Annotated, Any, Literal
from urllib.parse import quote

import msgspec
from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from pd_proxy.api.admin.backends import backend_id, find_backend
from pd_proxy.api.credentials import Credentials
from pd_proxy.api.operations import operator
from pd_proxy.decoding import decode_json
from pd_proxy.errors import BackendError, BackendNotFound, FanOutFailed, InvalidRequest
from pd_proxy.fleet.backend import Backend, Role
from pd_proxy.fleet.engine_families import Operation
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.state import Event
from pd_proxy.http.control import Control
from pd_proxy.workers.peers import PeerWorkers

_CALL_TIMEOUT = 300.0  # seconds; an engine writes its profile, or its weights to memory, before it answers
_LOOK = 0.02  # seconds between two looks at a backend that is being drained
_MOST_SAID = 1024 * 1024  # bytes of an engine's answer
_MOST_SHOWN = 500  # characters of what an engine said


class Which(BaseModel):
    """The backends that are meant; all where none is named."""

    model_config = ConfigDict(extra="forbid")

    role: Role | None = Field(None, description="only those of this pool")
    backend: str | None = Field(None, description="only this one, by its id or its URL")


class ResetQuery(Which):
    """As vLLM's."""

    reset_running_requests: bool = Field(False, description="preempt what runs, so that all blocks can be dropped")
    reset_external: bool = Field(False, description="the connector's cache too")


class SleepQuery(Which):
    """`level` and `mode` are vLLM's; `drain` and `force` the gateway's."""

    level: int = Field(
        1, ge=0, le=2, description="0: schedules nothing; 1: weights to the host's memory; 2: drops them"
    )
    mode: Literal["abort", "wait", "keep"] = Field("abort", description="what becomes of requests that still run")
    drain: float = Field(30.0, ge=0, le=600, description="seconds in which what runs on a backend may end")
    force: bool = Field(False, description="also when it has not ended by then")


class WakeQuery(Which):
    """As vLLM's."""

    tags: list[Literal["weights", "kv_cache", "scheduling"]] = Field([], description="wake only these; none: all")


class AdapterQuery(Which):
    """Which backends an adapter is for: those that serve one base model."""

    model: str | None = Field(None, description="the base model, where the gateway serves several")


class LoadAdapter(BaseModel):
    """As vLLM's."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=4096, description="as the engines find it")
    load_inplace: bool = Field(False, description="in the place of one of that name")
    is_3d_lora_weight: bool = False


class UnloadAdapter(BaseModel):
    """As vLLM's."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str = Field(min_length=1, max_length=256)
    lora_int_id: int | None = None


class Outcome(BaseModel):
    """How it went on one backend.

    Attributes:
        status: the engine's; None when it was not asked, or did not answer.
        answer: what it said, where that is JSON.
    """

    id: str
    role: Role
    ok: bool
    status: int | None
    error: str | None
    answer: Any = None


class Report(BaseModel):
    """How it went."""

    operation: str
    backends: list[Outcome]


async def _ask_nobody() -> None:
    return None


class FanOut:
    """Asks backends.

    Arguments:
        control: asks the engines.
        peers: the gateway's other workers, which have requests of their own.
        ask_models: asks the engines which models they have; it returns when they have said.
    """

    def __init__(
        self,
        fleet: Fleet,
        control: Control,
        peers: PeerWorkers | None = None,
        ask_models: Callable[[], Awaitable[object]] = _ask_nobody,
    ) -> None:
        self._fleet = fleet
        self._ask_models = ask_models
        self._peers = peers
        self._control = control

    async def ask(
        self,
        operation: Operation,
        which: Which,
        params: dict[str, Any] | None = None,
        one: Callable[[Backend], Awaitable[Outcome]] | None = None,
    ) -> Report:
        """Have backends do something, all at once.

        Arguments:
            one: how to have one of them do it, where there is more to it than the call.
        Raises:
            BackendNotFound: none is meant.
        """
        meant = self._meant(which)
        if one is None:

            async def one(backend: Backend) -> Outcome:
                return await self._call(backend, operation, params or {})

        return Report(operation=operation, backends=await asyncio.gather(*map(one, meant)))

    async def sleep(self, query: SleepQuery) -> Report:
        """Put backends to sleep, each when it is drained."""
        params = {"level": query.level, "mode": query.mode}

        async def one(backend: Backend) -> Outcome:
            draining = backend.draining
            name = quote(backend.url, safe="")
            self._fleet.drain(backend)
            try:
                if self._peers is not None:
                    await self._peers.post(f"/admin/backends/{name}/drain")
                if not await self._drained(backend, query.drain) and not query.force:
                    left = f"{backend.inflight_requests} request(s) and {backend.open_handoffs} hand-off(s)"
                    return _outcome(
                        backend, f"not put to sleep: {left} still need it; wait longer (drain), or force it"
                    )
                outcome = await self._call(backend, "sleep", params)
                if outcome.ok:
                    self._fleet.take_out(backend, "it was put to sleep", Event.ASLEEP)
                return outcome
            finally:
                if not draining and not backend.removed:
                    self._fleet.undrain(backend)
                    if self._peers is not None:
                        await self._peers.post(f"/admin/backends/{name}/undrain")

        return await self.ask("sleep", query, one=one)

    async def load(self, query: AdapterQuery, adapter: LoadAdapter) -> Report:
        """Load an adapter into every engine that serves its base model, prefill's too: both legs compute with it.

        Raises:
            InvalidRequest: several models are served, and none is named.
            BackendNotFound: none serves it.
        """
        meant = [backend for backend in self._meant(query) if backend.role != "encode"]
        bases = {backend.url: _bases(backend) for backend in meant}
        served = sorted(set().union(*bases.values()))
        if query.model is not None:
            meant = [backend for backend in meant if query.model in bases[backend.url] or backend.models is None]
            if not meant:
                raise BackendNotFound(f"no backend serves the base model {query.model[:256]!r}")
        elif query.backend is None and len(served) > 1:
            raise InvalidRequest(f"this gateway serves several models; name one (?model=): {', '.join(served)}"[:1000])
        return await self._adapt("load_lora_adapter", meant, adapter.model_dump(exclude_defaults=True))

    async def unload(self, query: AdapterQuery, adapter: UnloadAdapter) -> Report:
        """Unload an adapter from every engine that has it.

        Raises:
            BackendNotFound: none has it.
        """
        await self._ask_models()
        meant = [
            backend
            for backend in self._meant(query)
            if adapter.lora_name in (backend.models or {})
            and (query.model is None or (backend.models or {})[adapter.lora_name].get("parent") == query.model)
        ]
        if not meant:
            raise BackendNotFound(f"no backend has the adapter {adapter.lora_name!r}", param="lora_name")
        return await self._adapt("unload_lora_adapter", meant, adapter.model_dump(exclude_defaults=True))

    async def _adapt(self, operation: Operation, meant: list[Backend], body: dict[str, Any]) -> Report:
        encoded = msgspec.json.encode(body)
        outcomes = await asyncio.gather(*(self._call(backend, operation, {}, encoded) for backend in meant))
        await self._ask_models()  # requests for it may come as soon as this is answered
        return Report(operation=operation, backends=outcomes)

    async def _drained(self, backend: Backend, seconds: float) -> bool:
        """Wait until nothing needs a backend, here or in another worker; whether that came true in time."""
        end = monotonic() + seconds
        while not (backend.drained and (self._peers is None or await self._peers.drained(backend.url))):
            if monotonic() >= end:
                return False
            await asyncio.sleep(_LOOK)
        return True

    def _meant(self, which: Which) -> list[Backend]:
        found = [find_backend(self._fleet, which.backend)] if which.backend is not None else list(self._fleet)
        found = [backend for backend in found if which.role in (None, backend.role)]
        if not found:
            raise BackendNotFound("no backend of this gateway is meant; GET /admin/backends lists them")
        return found

    async def _call(self, backend: Backend, operation: Operation, params: dict[str, Any], body: bytes = b"") -> Outcome:
        path = backend.kind.operations.get(operation)
        if path is None:
            return _outcome(backend, f"a backend of the kind {backend.kind.name} has no {operation}")
        method = "GET" if operation == "is_sleeping" else "POST"
        shown = {name: str(value).lower() if isinstance(value, bool) else value for name, value in params.items()}
        try:
            answer = await self._control.ask(
                backend.url + path, method=method, query=shown, body=body, seconds=_CALL_TIMEOUT, limit=_MOST_SAID
            )
        except BackendError as error:
            return _outcome(backend, f"{path} could not be asked: {error}")
        said: Any = None
        if answer.type == b"application/json":
            try:
                said = decode_json(answer.body)
            except ValueError:
                said = None
        if answer.status < 300:
            if operation == "reset_prefix_cache":
                self._fleet.lost_cache(backend)
            return _outcome(backend, None, answer.status, said)
        text = answer.body.decode("utf-8", "replace")[:_MOST_SHOWN]
        return _outcome(backend, f"{path} answered {answer.status}: {text}", answer.status)


def _outcome(backend: Backend, error: str | None, status: int | None = None, answer: Any = None) -> Outcome:
    name = backend_id(backend.url)
    return Outcome(id=name, role=backend.role, ok=error is None, status=status, error=error, answer=answer)


def _bases(backend: Backend) -> set[str]:
    """The models of a backend that are no adapters."""
    return {name for name, card in (backend.models or {}).items() if not card.get("parent")}


def fanout(
    fleet: Fleet,
    credentials: Credentials,
    control: Control,
    ask_models: Callable[[], Awaitable[object]],
    peers: PeerWorkers | None = None,
) -> APIRouter:
    """The routes, for operators. Those of the example script, without /admin, are kept."""
    router = APIRouter(tags=["engines"], dependencies=[Depends(operator(credentials))])
    engines = FanOut(fleet, control, peers, ask_models)

    @router.post("/admin/reset_prefix_cache", response_model=Report)
    async def reset_prefix_cache(query: Annotated[ResetQuery, Query()]) -> Response:
        """Drop the engines' prefix caches."""
        return _response(await engines.ask("reset_prefix_cache", query, _of_reset(query)))

    @router.post("/admin/start_profile", response_model=Report)
    async def start_profile(query: Annotated[Which, Query()]) -> Response:
        """Start the engines' profilers, where one is configured."""
        return _response(await engines.ask("start_profile", query))

    @router.post("/admin/stop_profile", response_model=Report)
    async def stop_profile(query: Annotated[Which, Query()]) -> Response:
        """Stop them; each engine writes its profile before it answers."""
        return _response(await engines.ask("stop_profile", query))

    @router.post("/admin/sleep", response_model=Report)
    async def sleep(query: Annotated[SleepQuery, Query()]) -> Response:
        """Put engines to sleep. Each is drained first, and gets no requests until it is awake."""
        return _response(await engines.sleep(query))

    @router.post("/admin/wake_up", response_model=Report)
    async def wake_up(query: Annotated[WakeQuery, Query()]) -> Response:
        """Wake engines. Each gets requests again when its next health check finds it awake."""
        return _response(await engines.ask("wake_up", query, {"tags": query.tags} if query.tags else None))

    @router.get("/admin/is_sleeping", response_model=Report)
    async def is_sleeping(query: Annotated[Which, Query()]) -> Response:
        """Ask each engine whether it sleeps."""
        return _response(await engines.ask("is_sleeping", query))

    _add_adapters(router, engines)
    _add_script_reset(router, fleet, engines)
    router.add_api_route("/start_profile", start_profile, methods=["POST"], response_model=Report, deprecated=True)
    router.add_api_route("/stop_profile", stop_profile, methods=["POST"], response_model=Report, deprecated=True)
    return router


def _add_adapters(router: APIRouter, engines: FanOut) -> None:
    """Add the routes for LoRA adapters."""

    @router.post("/v1/load_lora_adapter", response_model=Report)
    async def load_lora_adapter(query: Annotated[AdapterQuery, Query()], adapter: LoadAdapter) -> Response:
        """Load a LoRA adapter into every engine of its base model. Clients can ask for it from then on."""
        return _response_as_one(await engines.load(query, adapter))

    @router.post("/v1/unload_lora_adapter", response_model=Report)
    async def unload_lora_adapter(query: Annotated[AdapterQuery, Query()], adapter: UnloadAdapter) -> Response:
        """Unload a LoRA adapter from every engine that has it."""
        return _response_as_one(await engines.unload(query, adapter))


def _add_script_reset(router: APIRouter, fleet: Fleet, engines: FanOut) -> None:
    """Add the reset as the example script has it."""

    @router.post("/reset_prefix_cache", response_class=Response, deprecated=True)
    async def reset_prefix_cache_as_the_script(query: Annotated[ResetQuery, Query()]) -> Response:
        """/admin/reset_prefix_cache, answered as by the example script: 200 without a body, or 500 with `failed`."""
        report = await engines.ask("reset_prefix_cache", query, _of_reset(query))
        failed = [outcome for outcome in report.backends if not outcome.ok]
        if not failed:
            return Response(status_code=200)
        error = {
            "message": f"{len(failed)} backend(s) did not reset their prefix cache",
            "type": "backend_error",
            "param": None,
            "code": "reset_failed",
        }
        urls = {backend_id(backend.url): backend.url for backend in fleet}
        return JSONResponse({"error": error, "failed": [urls.get(one.id, one.id) for one in failed]}, status_code=500)


def _of_reset(query: ResetQuery) -> dict[str, Any]:
    """The parameters of a reset that differ from the engine's defaults: older ones do not know them."""
    return query.model_dump(include={"reset_running_requests", "reset_external"}, exclude_defaults=True)


def _response_as_one(report: Report) -> Response:
    """As `_response`; where all engines refused alike, with their status, which is what scripts for one engine know."""
    answer = _response(report)
    [status, *others] = {outcome.status for outcome in report.backends}
    if status is not None and 400 <= status < 500 and not others:
        answer.status_code = status
    return answer


def _response(report: Report) -> Response:
    """200 when all went well; else 502, with an error beside the report."""
    failed = sum(not outcome.ok for outcome in report.backends)
    if not failed:
        return JSONResponse(report.model_dump())
    error = FanOutFailed(f"{failed} of {len(report.backends)} backend(s) failed: see backends")
    return JSONResponse({**error.detail(), **report.model_dump()}, status_code=error.status)
