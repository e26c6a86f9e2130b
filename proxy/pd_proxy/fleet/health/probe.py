"""One probe of an engine, which asks whether it is alive and awake; and single pages of an engine."""

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
"""The exceptions of reading JSON that has another shape than expected."""


class ProbeFailed(Exception):
    """The backend should get no requests; the text says why, for people.

    Arguments:
        code: of `findings.py`.
    """

    def __init__(self, message: str, code: str = "failed") -> None:
        super().__init__(message)
        self.code = code

    def finding(self, backend: Backend) -> Finding:
        """The failure as a finding about a backend, which says what to do about it."""
        return found(self.code, f"{backend.role} backend {backend.url} is not up: {self}", backend.url)


class Probe:
    """Asks engines whether they are healthy, and for single pages.

    Arguments:
        control: sends the requests; its timeout bounds each request of a probe.
        seconds: the time limit of a connection that is tried apart from a probe.
    """

    def __init__(self, control: Control, seconds: float) -> None:
        self._control = control
        self._seconds = seconds
        self._resting: dict[Backend, set[str]] = {}  # the paths at which engines answer whether they are asleep

    def forget(self, backend: Backend) -> None:
        """Forget a backend that has left the fleet."""
        self._resting.pop(backend, None)

    async def why_unreachable(self, host: str, port: int) -> str:
        """Why a connection to an address fails, for people; empty if it does not."""
        return await why_unreachable(self._control, host, port, self._seconds)

    async def lives(self, backend: Backend) -> bool:
        """Whether a backend may be alive. One that does not answer in time may be: its host or this one may be busy."""
        try:
            await self.probe(backend)
        except ProbeFailed as failure:
            return failure.code == "timeout"
        return True

    async def probe(self, backend: Backend) -> None:
        """Ask a backend once whether it is healthy and awake.

        Raises:
            ProbeFailed: it is not, or did not answer in time.
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
        """The member of an answer by which a healthy engine says that it takes no requests; empty if it takes them.
        Only engines in development mode have these routes. An engine without the first is not asked for the others."""
        for path, member in backend.kind.rests.items():
            if backend.up and path not in self._resting.get(backend, ()):
                continue
            try:
                answer = await self.get(backend, path)
            except ProbeFailed as failure:
                if backend.up and failure.code == "timeout":
                    break  # vLLM answers this between two steps only, and /health at any time: the step may be long
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
        """The body of a page; empty if the engine does not have it, or does not answer in time."""
        try:
            answer = await self._control.ask(url, seconds=seconds)
        except BackendError:
            return b""
        return answer.body if answer.status == 200 else b""

    async def get(self, backend: Backend, path: str) -> Answer:
        """GET a path of a backend.

        Raises:
            ProbeFailed: there was no whole answer in time.
        """
        return await self.fetch(backend.url + path, path)

    async def fetch(self, url: str, path: str) -> Answer:
        """GET a URL.

        Arguments:
            path: what messages call it.
        Raises:
            ProbeFailed: there was no whole answer in time.
        """
        try:
            return await self._control.ask(url)
        except BackendTimedOut:
            raise ProbeFailed(f"{path} did not answer within {self._control.timeout:g} s", "timeout") from None
        except BackendError as error:
            raise ProbeFailed(f"{path} could not be asked: {reason_of(error)}", code_of(error)) from error
