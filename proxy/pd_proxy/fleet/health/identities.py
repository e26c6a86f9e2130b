"""The identities of engines, each valid while a sentinel connection to its engine is open (`sentinel.py`)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.health.identity import read_identity
from pd_proxy.fleet.health.sentinel import Sentinel, SentinelClosed
from pd_proxy.http.control import Control

log = logging.getLogger("pd_proxy.fleet")


class Identities:
    """Keeps a sentinel connection to each engine whose identity is wanted.

    Arguments:
        control: has the certificates that the connections trust.
        seconds: the time limit of one exchange.
        wanted: whether the identity of a backend's engine is needed.
        headers: header lines of each request.
    """

    def __init__(self, control: Control, seconds: float, wanted: Callable[[Backend], bool], headers: bytes) -> None:
        self._control = control
        self._seconds = seconds
        self._wanted = wanted
        self._headers = headers
        self._sentinels: dict[Backend, Sentinel] = {}

    async def connect(self, backend: Backend) -> None:
        """Read an engine's identity over a new sentinel connection. If that fails, the identity is not known, and the
        engine gets only hand-offs that fit every engine."""
        self.disconnect(backend)
        kind = backend.kind
        if not self._wanted(backend) or not (kind.metrics and kind.version[0]):
            return
        seconds = self._seconds
        try:
            sentinel = await Sentinel.connect(
                backend.url,
                self._headers,
                lambda: backend.learn(None),
                seconds,
                lambda: self._control.trust,
            )
            self._sentinels[backend] = sentinel
            answers = [await sentinel.ask(page, seconds) for page in (kind.metrics, "/v1/models", kind.version[0])]
        except SentinelClosed as error:
            log.debug("%s backend %s did not report its identity: %s", backend.role, backend.url, error)
            self.disconnect(backend)
            return
        identity = read_identity(*(body if status == 200 else b"" for status, body in answers))
        if identity is None or not sentinel.holds:
            self.disconnect(backend)
        else:
            backend.learn(identity)

    async def keep(self, backend: Backend, *, anew: bool) -> None:
        """Send a request over the sentinel connection, so that it does not become idle; or connect again if it has
        ended.

        Arguments:
            anew: connect also if there was no sentinel connection, since the identity could not be read.
        """
        sentinel, identity = self._sentinels.get(backend), backend.identity
        if sentinel is not None and sentinel.holds and identity is not None:
            with suppress(SentinelClosed):
                status, answer = await sentinel.ask(backend.kind.version[0], self._seconds)
                if status == 200 and identity.version.encode() not in answer:
                    backend.learn(None)
        elif anew or sentinel is not None:
            await self.connect(backend)

    def disconnect(self, backend: Backend) -> None:
        """Close the sentinel connection; the identity is not known any more."""
        if backend.identity is not None:
            backend.learn(None)
        if sentinel := self._sentinels.pop(backend, None):
            sentinel.close()
