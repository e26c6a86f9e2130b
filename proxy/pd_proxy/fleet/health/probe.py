"""One probe of an engine: is it alive and awake? And its pages, as the control plane's client fetches them."""

from __future__ import annotations

from contextlib import suppress

from pd_proxy.decoding import decode_json
from pd_proxy.errors import BackendError, BackendTimedOut
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.findings import Finding, found
from pd_proxy.http.control import Answer, Control
from pd_proxy.http.reachability import code_of, reason_of, why_unreachable

_RESTS = {
    "is_sleeping": "it is asleep, or paused (POST /admin/wake_up, or the engine's own /resume, ends that)",
    "is_paused": "it is paused (POST /resume to the engine ends that)",
}
NOT_AS_EXPECTED = (ValueError, KeyError, TypeError, AttributeError)
"""What reading an engine's JSON may raise where it is not what such engines send."""


class ProbeFailed(Exception):
    """A probe that says the backend should get no requests; the text says why, for people.

    Arguments:
        code: of `findings.py`.
    """

    def __init__(self, message: str, code: str = "failed") -> None:
        super().__init__(message)
        self.code = code

    def finding(self, backend: Backend) -> Finding:
        """The same of a backend, with what to do about it."""
        return found(self.code, f"{backend.role} backend {backend.url} is not up: {self}", backend.url)


class Probe:
    """Asks engines whether they are well, and for single pages.

    Arguments:
        control: asks the engines; its timeout bounds one probe.
        seconds: the time limit of pages that are asked for beside a probe.
    """

    def __init__(self, control: Control, seconds: float) -> None:
        self._control = control
        self._seconds = seconds
        self._resting: dict[Backend, set[str]] = {}  # the paths at which engines have said that they can rest

    def forget(self, backend: Backend) -> None:
        """A backend has left for good."""
        self._resting.pop(backend, None)

    async def why_unreachable(self, host: str, port: int) -> str:
        """Why no connection to an address comes about, for people; empty where one does."""
        return await why_unreachable(self._control, host, port, self._seconds)

    async def lives(self, backend: Backend) -> bool:
        """Whether a backend may be alive. One that is slow to say so may be: the machine is busy, or this one is."""
        try:
            await self.probe(backend)
        except ProbeFailed as failure:
            return failure.code == "timeout"
        return True

    async def probe(self, backend: Backend) -> None:
        """Ask once whether it is healthy and awake.

        Raises:
            ProbeFailed: anything but 200 in time.
        """
        path = backend.kind.health
        answer = await self.get(backend, path)
        if (status := answer.status) == 508:
            raise ProbeFailed("it is this gateway itself, or leads back to it", "no_engine")
        if status != 200:
            code = "key_refused" if status in (401, 403) else "unhealthy" if status >= 500 else "no_engine"
            raise ProbeFailed(f"{path} answered {status}", code)
        if member := await self._rests(backend):
            raise ProbeFailed(_RESTS[member], "asleep")

    async def _rests(self, backend: Backend) -> str:
        """The member by which it says that it takes no requests though it is well, or an empty string. Only engines in
        development mode can, and only they have the routes; one without the first is not asked for the others."""
        for path, member in backend.kind.rests.items():
            if backend.up and path not in self._resting.get(backend, ()):
                continue
            try:
                answer = await self.get(backend, path)
            except ProbeFailed as failure:
                if backend.up and failure.code == "timeout":
                    break  # vLLM answers this between two steps, /health at any time: a long step is no rest
                raise
            can = self._resting.setdefault(backend, set())
            if answer.status != 200:
                can.discard(path)
                break
            can.add(path)
            with suppress(*NOT_AS_EXPECTED):
                if decode_json(answer.body)[member] is True:
                    return member
        return ""

    async def page(self, url: str, seconds: float) -> bytes:
        """A page, or nothing where it is not there."""
        try:
            answer = await self._control.ask(url, seconds=seconds)
        except BackendError:
            return b""
        return answer.body if answer.status == 200 else b""

    async def get(self, backend: Backend, path: str) -> Answer:
        return await self.fetch(backend.url + path, path)

    async def fetch(self, url: str, path: str) -> Answer:
        try:
            return await self._control.ask(url)
        except BackendTimedOut:
            raise ProbeFailed(f"{path} did not answer within {self._control.timeout:g} s", "timeout") from None
        except BackendError as error:
            raise ProbeFailed(f"{path} could not be asked: {reason_of(error)}", code_of(error)) from error
