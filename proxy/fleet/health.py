"""Active health checks: one watcher a backend, which brings it into the rotation and takes it out.

httpx carries the probes and tenacity their patience. `/health` decides; `/v1/models` and `/version` are learnt on the
way in and now and then after. Probes say whether a backend is alive; whether it is any good, its requests say.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
    wait_fixed,
    wait_random,
)

from proxy.fleet.backend import Backend
from proxy.fleet.fleet import Fleet
from proxy.settings import Health

log = logging.getLogger("pd_proxy.fleet")

_RELEARN = 15.0  # seconds; LoRA adapters come and go at run time
_FIRST_WAIT = 0.1  # seconds between the first probes of a backend that is down: engines start in bursts
_NOT_AS_EXPECTED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # of an answer's JSON


class ProbeFailed(Exception):
    """A probe that says the backend should get no requests; the text says why, for people."""


class Prober:
    """Watches every backend of a fleet while it runs.

    Arguments:
        http: a client whose timeout bounds one probe.
        on_leave: told of backends that have left the fleet.
    """

    def __init__(
        self,
        fleet: Fleet,
        settings: Health,
        http: httpx.AsyncClient,
        *,
        on_leave: Callable[[Backend], object] = lambda backend: None,
    ) -> None:
        self._fleet = fleet
        self._settings = settings
        self._http = http
        self._on_leave = on_leave
        self._watchers: dict[Backend, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Watch what is in the fleet now and whatever joins later."""
        self._fleet.on_join = self._join
        self._fleet.on_leave = self._leave
        for backend in self._fleet:
            self._join(backend)

    async def stop(self) -> None:
        """End all watchers."""
        self._fleet.on_join = self._fleet.on_leave = None
        watchers = list(self._watchers.values())
        for watcher in watchers:
            watcher.cancel()
        for watcher in watchers:
            with suppress(asyncio.CancelledError):
                await watcher
        self._watchers.clear()

    def _join(self, backend: Backend) -> None:
        self._watchers[backend] = asyncio.create_task(self._watch(backend), name=f"probe {backend.url}")

    def _leave(self, backend: Backend) -> None:
        if watcher := self._watchers.pop(backend, None):
            watcher.cancel()
        self._on_leave(backend)

    async def _watch(self, backend: Backend) -> None:
        while True:
            try:
                await self._until_up(backend)
                await self._until_down(backend)
            except Exception:  # whatever an engine may answer, its watcher must not end
                log.exception("watching %s backend %s failed; it goes on", backend.role, backend.url)
                await asyncio.sleep(self._settings.interval)

    async def _until_up(self, backend: Backend) -> None:
        """Probe until it answers, ever more slowly."""
        patience = AsyncRetrying(
            retry=retry_if_exception_type(ProbeFailed),
            wait=wait_exponential(multiplier=_FIRST_WAIT, max=self._settings.longest_wait)
            + wait_random(0, _FIRST_WAIT),
            before_sleep=lambda state: self._still_down(backend, state),
        )
        async for attempt in patience:
            with attempt:
                await self.probe(backend)
                await self._learn(backend)
        backend.attention.clear()
        self._fleet.bring_in(backend)

    def _still_down(self, backend: Backend, state: RetryCallState) -> None:
        self._fleet.forget_idle()
        reason = str(state.outcome.exception()) if state.outcome else "not probed yet"
        if reason != backend.reason:
            log.warning("%s backend %s is not up: %s", backend.role, backend.url, reason)
            backend.reason = reason

    async def _until_down(self, backend: Backend) -> None:
        """Probe at the interval, or at once when a request failed, until the probes fail or a request took it out."""
        loop = asyncio.get_running_loop()
        learnt = loop.time()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.interval):
                    await backend.attention.wait()
            backend.attention.clear()
            self._fleet.forget_idle()
            if not backend.up:
                return
            try:
                async for attempt in AsyncRetrying(
                    retry=retry_if_exception_type(ProbeFailed),
                    stop=stop_after_attempt(self._settings.failures),
                    wait=wait_fixed(min(0.2, self._settings.interval)),
                    reraise=True,
                ):
                    with attempt:
                        await self.probe(backend)
            except ProbeFailed as failure:
                self._fleet.take_out(backend, str(failure))
                return
            if loop.time() - learnt > _RELEARN:
                learnt = loop.time()
                with suppress(ProbeFailed):
                    await self._learn(backend)

    async def probe(self, backend: Backend) -> None:
        """Ask /health once.

        Raises:
            ProbeFailed: anything but 200 in time.
        """
        answer = await self._get(backend, "/health")
        if answer.status_code != 200:
            raise ProbeFailed(f"/health answered {answer.status_code}")

    async def _learn(self, backend: Backend) -> None:
        """Read the model ids and the version. An engine without one of the two is no worse for it, one that cannot
        be reached is."""
        models = await self._get(backend, "/v1/models")
        if models.status_code == 200:
            with suppress(*_NOT_AS_EXPECTED):
                backend.models = {str(card["id"]): dict(card) for card in models.json()["data"]}
        elif models.status_code in (401, 403):
            raise ProbeFailed(f"/v1/models answered {models.status_code}: set backend_api_key")
        version = await self._get(backend, "/version")
        if version.status_code == 200:
            with suppress(*_NOT_AS_EXPECTED):
                backend.version = str(version.json()["version"])

    async def _get(self, backend: Backend, path: str) -> httpx.Response:
        try:
            return await self._http.get(backend.url + path)
        except httpx.TimeoutException:
            raise ProbeFailed(f"{path} did not answer within {self._settings.timeout:g} s") from None
        except httpx.HTTPError as error:
            raise ProbeFailed(f"{path} could not be asked: {str(error) or type(error).__name__}") from None
