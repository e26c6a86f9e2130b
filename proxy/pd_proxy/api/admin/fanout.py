"""Operations on all engines or some of them: cache reset, profiler, sleep and wake-up, LoRA adapters.

Each call goes to the path that the engine's family has for it, with the parameters that are named here and no others.
The answer reports the outcome for each backend. A backend is put to sleep only when nothing needs it: it is drained
first, and its health checks count it as down until it has been woken.
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

_CALL_TIMEOUT = 300.0  # seconds; an engine writes its profile, or moves its weights, before it answers
_DRAIN_INTERVAL = 0.02  # seconds between two checks of a backend that is being drained
_MOST_READ = 1024 * 1024  # bytes of an engine's answer
_MOST_SHOWN = 500  # characters of an engine's error that a report shows


class BackendFilter(BaseModel):
    """The backends that an operation is for; all where nothing is named."""

    model_config = ConfigDict(extra="forbid")

    role: Role | None = Field(None, description="only those of this pool")
    backend: str | None = Field(None, description="only this one, by its id or its URL")


class ResetQuery(BackendFilter):
    """The parameters of vLLM's `reset_prefix_cache`."""

    reset_running_requests: bool = Field(False, description="preempt running requests, so that all blocks are freed")
    reset_external: bool = Field(False, description="the connector's cache too")


class SleepQuery(BackendFilter):
    """`level` and `mode` are vLLM's parameters; `drain` and `force` are the gateway's."""

    level: int = Field(
        1, ge=0, le=2, description="0: stop scheduling; 1: move the weights to the host's memory; 2: discard them"
    )
    mode: Literal["abort", "wait", "keep"] = Field("abort", description="what vLLM does with requests that still run")
    drain: float = Field(30.0, ge=0, le=600, description="seconds to wait until a backend's requests have ended")
    force: bool = Field(False, description="put it to sleep even where they have not")


class WakeQuery(BackendFilter):
    """The parameters of vLLM's `wake_up`."""

    tags: list[Literal["weights", "kv_cache", "scheduling"]] = Field([], description="wake only these; none: all")


class AdapterQuery(BackendFilter):
    """The backends that an adapter is for: those that serve one base model."""

    model: str | None = Field(None, description="the base model, where the gateway serves several")


class LoadAdapter(BaseModel):
    """The body of vLLM's `load_lora_adapter`."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=4096, description="its path on the engines' machines")
    load_inplace: bool = Field(False, description="replace a loaded adapter of the same name")
    is_3d_lora_weight: bool = False


class UnloadAdapter(BaseModel):
    """The body of vLLM's `unload_lora_adapter`."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str = Field(min_length=1, max_length=256)
    lora_int_id: int | None = None


class Outcome(BaseModel):
    """The outcome of an operation on one backend.

    Attributes:
        status: the status of the engine's answer; None where the engine was not asked or did not answer.
        answer: the body of the engine's answer, where that is JSON.
    """

    id: str
    role: Role
    ok: bool
    status: int | None
    error: str | None
    answer: Any = None


class Report(BaseModel):
    """The outcomes of an operation on all backends that it was for."""

    operation: str
    backends: list[Outcome]


async def _ask_no_models() -> None:
    return None


class FanOut:
    """Sends operations to several engines at once.

    Arguments:
        control: the HTTP client for engines.
        peers: the other workers of the gateway, which have requests of their own.
        ask_models: asks the engines for their models; returns when they have answered.
    """

    def __init__(
        self,
        fleet: Fleet,
        control: Control,
        peers: PeerWorkers | None = None,
        ask_models: Callable[[], Awaitable[object]] = _ask_no_models,
    ) -> None:
        self._fleet = fleet
        self._ask_models = ask_models
        self._peers = peers
        self._control = control

    async def ask(
        self,
        operation: Operation,
        chosen: BackendFilter,
        params: dict[str, Any] | None = None,
        on_each: Callable[[Backend], Awaitable[Outcome]] | None = None,
    ) -> Report:
        """Carry out an operation on the chosen backends, on all at once.

        Arguments:
            on_each: carries out the operation on one backend, where that is more than one call to its engine.
        Raises:
            BackendNotFound: no backend is chosen.
        """
        backends = self._chosen(chosen)
        if on_each is None:

            async def on_each(backend: Backend) -> Outcome:
                return await self._call(backend, operation, params or {})

        return Report(operation=operation, backends=await asyncio.gather(*map(on_each, backends)))

    async def sleep(self, query: SleepQuery) -> Report:
        """Put backends to sleep, each as soon as it is drained."""
        params = {"level": query.level, "mode": query.mode}

        async def sleep_one(backend: Backend) -> Outcome:
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

        return await self.ask("sleep", query, on_each=sleep_one)

    async def load(self, query: AdapterQuery, adapter: LoadAdapter) -> Report:
        """Load an adapter into every engine that serves its base model. Prefill engines need it as well as decode
        engines, since both legs compute with it.

        Raises:
            InvalidRequest: several models are served, and the query names none.
            BackendNotFound: no backend serves the model.
        """
        backends = [backend for backend in self._chosen(query) if backend.role != "encode"]
        bases = {backend.url: _base_models(backend) for backend in backends}
        served = sorted(set().union(*bases.values()))
        if query.model is not None:
            backends = [backend for backend in backends if query.model in bases[backend.url] or backend.models is None]
            if not backends:
                raise BackendNotFound(f"no backend serves the base model {query.model[:256]!r}")
        elif query.backend is None and len(served) > 1:
            raise InvalidRequest(f"this gateway serves several models; name one (?model=): {', '.join(served)}"[:1000])
        return await self._adapt("load_lora_adapter", backends, adapter.model_dump(exclude_defaults=True))

    async def unload(self, query: AdapterQuery, adapter: UnloadAdapter) -> Report:
        """Unload an adapter from every engine that has it.

        Raises:
            BackendNotFound: no backend has it.
        """
        await self._ask_models()
        backends = [
            backend
            for backend in self._chosen(query)
            if adapter.lora_name in (backend.models or {})
            and (query.model is None or (backend.models or {})[adapter.lora_name].get("parent") == query.model)
        ]
        if not backends:
            raise BackendNotFound(f"no backend has the adapter {adapter.lora_name!r}", param="lora_name")
        return await self._adapt("unload_lora_adapter", backends, adapter.model_dump(exclude_defaults=True))

    async def _adapt(self, operation: Operation, backends: list[Backend], body: dict[str, Any]) -> Report:
        """Load or unload an adapter."""
        encoded = msgspec.json.encode(body)
        outcomes = await asyncio.gather(*(self._call(backend, operation, {}, encoded) for backend in backends))
        await self._ask_models()  # clients may ask for the adapter as soon as this is answered
        return Report(operation=operation, backends=outcomes)

    async def _drained(self, backend: Backend, seconds: float) -> bool:
        """Wait until nothing needs a backend, in this worker or another. Returns whether that came true in time."""
        end = monotonic() + seconds
        while not (backend.drained and (self._peers is None or await self._peers.drained(backend.url))):
            if monotonic() >= end:
                return False
            await asyncio.sleep(_DRAIN_INTERVAL)
        return True

    def _chosen(self, chosen: BackendFilter) -> list[Backend]:
        """The backends that a filter chooses.

        Raises:
            BackendNotFound: there is none.
        """
        found = [find_backend(self._fleet, chosen.backend)] if chosen.backend is not None else list(self._fleet)
        found = [backend for backend in found if chosen.role in (None, backend.role)]
        if not found:
            raise BackendNotFound("no backend of this gateway matches; GET /admin/backends lists them")
        return found

    async def _call(self, backend: Backend, operation: Operation, params: dict[str, Any], body: bytes = b"") -> Outcome:
        """Call one engine."""
        path = backend.kind.operations.get(operation)
        if path is None:
            return _outcome(backend, f"a backend of the kind {backend.kind.name} has no {operation}")
        method = "GET" if operation == "is_sleeping" else "POST"
        query = {name: str(value).lower() if isinstance(value, bool) else value for name, value in params.items()}
        try:
            answer = await self._control.ask(
                backend.url + path, method=method, query=query, body=body, seconds=_CALL_TIMEOUT, limit=_MOST_READ
            )
        except BackendError as error:
            return _outcome(backend, f"{path} could not be asked: {error}")
        content: Any = None
        if answer.type == b"application/json":
            try:
                content = decode_json(answer.body)
            except ValueError:
                content = None
        if answer.status < 300:
            if operation == "reset_prefix_cache":
                self._fleet.lost_cache(backend)
            return _outcome(backend, None, answer.status, content)
        text = answer.body.decode("utf-8", "replace")[:_MOST_SHOWN]
        return _outcome(backend, f"{path} answered {answer.status}: {text}", answer.status)


def _outcome(backend: Backend, error: str | None, status: int | None = None, answer: Any = None) -> Outcome:
    name = backend_id(backend.url)
    return Outcome(id=name, role=backend.role, ok=error is None, status=status, error=error, answer=answer)


def _base_models(backend: Backend) -> set[str]:
    """The models of a backend that are not adapters."""
    return {name for name, card in (backend.models or {}).items() if not card.get("parent")}


def fanout(
    fleet: Fleet,
    credentials: Credentials,
    control: Control,
    ask_models: Callable[[], Awaitable[object]],
    peers: PeerWorkers | None = None,
) -> APIRouter:
    """The routes of these operations, for operators. The example script's paths, without /admin, exist too."""
    router = APIRouter(tags=["engines"], dependencies=[Depends(operator(credentials))])
    engines = FanOut(fleet, control, peers, ask_models)

    @router.post("/admin/reset_prefix_cache", response_model=Report)
    async def reset_prefix_cache(query: Annotated[ResetQuery, Query()]) -> Response:
        """Drop the engines' prefix caches."""
        return _report_answer(await engines.ask("reset_prefix_cache", query, _of_reset(query)))

    @router.post("/admin/start_profile", response_model=Report)
    async def start_profile(query: Annotated[BackendFilter, Query()]) -> Response:
        """Start the engines' profilers, where one is configured."""
        return _report_answer(await engines.ask("start_profile", query))

    @router.post("/admin/stop_profile", response_model=Report)
    async def stop_profile(query: Annotated[BackendFilter, Query()]) -> Response:
        """Stop the engines' profilers. Each engine writes its profile before it answers."""
        return _report_answer(await engines.ask("stop_profile", query))

    @router.post("/admin/sleep", response_model=Report)
    async def sleep(query: Annotated[SleepQuery, Query()]) -> Response:
        """Put engines to sleep. Each is drained first and gets no requests until it is awake."""
        return _report_answer(await engines.sleep(query))

    @router.post("/admin/wake_up", response_model=Report)
    async def wake_up(query: Annotated[WakeQuery, Query()]) -> Response:
        """Wake engines. Each gets requests again when its next health check finds it awake."""
        return _report_answer(await engines.ask("wake_up", query, {"tags": query.tags} if query.tags else None))

    @router.get("/admin/is_sleeping", response_model=Report)
    async def is_sleeping(query: Annotated[BackendFilter, Query()]) -> Response:
        """Ask each engine whether it is asleep."""
        return _report_answer(await engines.ask("is_sleeping", query))

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
        return _adapter_answer(await engines.load(query, adapter))

    @router.post("/v1/unload_lora_adapter", response_model=Report)
    async def unload_lora_adapter(query: Annotated[AdapterQuery, Query()], adapter: UnloadAdapter) -> Response:
        """Unload a LoRA adapter from every engine that has it."""
        return _adapter_answer(await engines.unload(query, adapter))


def _add_script_reset(router: APIRouter, fleet: Fleet, engines: FanOut) -> None:
    """Add the cache reset at the example script's path."""

    @router.post("/reset_prefix_cache", response_class=Response, deprecated=True)
    async def reset_prefix_cache_as_the_script(query: Annotated[ResetQuery, Query()]) -> Response:
        """As /admin/reset_prefix_cache, with the example script's answers: 200 without a body, or 500 with `failed`."""
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
    """The parameters of a reset that differ from the engine's defaults. Older engines do not know these parameters."""
    return query.model_dump(include={"reset_running_requests", "reset_external"}, exclude_defaults=True)


def _adapter_answer(report: Report) -> Response:
    """As `_report_answer`, but where all engines refused with the same 4xx, the status is theirs: scripts written for
    one engine expect it."""
    answer = _report_answer(report)
    [status, *others] = {outcome.status for outcome in report.backends}
    if status is not None and 400 <= status < 500 and not others:
        answer.status_code = status
    return answer


def _report_answer(report: Report) -> Response:
    """The answer to an operation: 200 where every backend succeeded, else 502 with an error beside the report."""
    failed = sum(not outcome.ok for outcome in report.backends)
    if not failed:
        return JSONResponse(report.model_dump())
    error = FanOutFailed(f"{failed} of {len(report.backends)} backend(s) failed: see backends")
    return JSONResponse({**error.detail(), **report.model_dump()}, status_code=error.status)
