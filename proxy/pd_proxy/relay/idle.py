"""The silence of a live stream's engine, and of its client.

A stream costs one timer in an idle period, not one a token. Time for which the client has kept the engine waiting is
not the engine's silence.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Protocol

from pd_proxy.errors import BackendError

_SUSPECTED = 1.0  # seconds of silence that are enough for a backend which fails its health checks
_GAPS = 4  # usual gaps between tokens that are silence: a slow stream moves too
_LATE = 0.25  # share of these seconds that the event loop may be late; else it listens once more
_LOOKS = 5  # times that it listens, at most


class Watched(Protocol):
    """A stream whose silence is watched."""

    def last_token(self) -> float:
        """When its last token came, as `time.monotonic`; 0 before any."""

    def usual_gap(self) -> float:
        """The mean gap between its tokens, in seconds; 0 before the second."""

    def fail(self, error: BackendError) -> None:
        """End it."""

    def engine_is_silent(self, seconds: float) -> None:
        """Its engine has sent nothing for so long."""

    def client_is_silent(self) -> None:
        """Its client has read nothing for as long."""


class IdleWatch:
    """Watches one stream for silence.

    Arguments:
        stream: what is watched; `stop` ends the reference to it.
        seconds: of silence after which it counts as dead, or None.
    Attributes:
        heard: when the engine was last heard beside the fast path, as `time.monotonic`.
        paused_since: when the client began to keep the engine waiting, as `time.monotonic`; None where it does not.
    """

    __slots__ = ("_loop", "_seconds", "_stream", "_suspected", "_timer", "heard", "paused_since")

    def __init__(self, stream: Watched, loop: asyncio.AbstractEventLoop, seconds: float | None) -> None:
        self._stream: Watched | None = stream
        self._loop = loop
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._suspected = -1.0  # the last sign at the time of a suspicion that is being looked into
        self.heard = 0.0
        self.paused_since: float | None = None

    def start(self) -> None:
        """From now on silence counts."""
        if self._seconds is not None:
            self._timer = self._loop.call_later(self._seconds, self.check)

    def stop(self) -> None:
        """The stream is over."""
        self._stream = None
        if self._timer is not None:
            self._timer.cancel()

    def pause(self) -> None:
        """The client does not keep up."""
        self.paused_since = monotonic()

    def resume(self) -> None:
        """The client keeps up again."""
        self.paused_since = None
        self.heard = monotonic()

    def suspect(self, error: BackendError) -> None:
        """The backend is said to be dead. A stream that moves is believed more than that; one that is silent from now
        on fails with `error`, after `_SUSPECTED` seconds or `_GAPS` times its usual gap between tokens.

        Silence before the suspicion counts for nothing: where the gateway stood still, it has read nothing meanwhile.
        So does the silence of a time in which the event loop was late."""
        stream = self._stream
        if self.paused_since is not None or stream is None:
            return  # it is the client that keeps it waiting
        loop, sign = self._loop, self._last_sign(stream)
        if self._suspected == sign:
            return  # it is being looked into
        seconds = max(_SUSPECTED, _GAPS * stream.usual_gap())
        if self._seconds is not None:
            seconds = min(seconds, self._seconds)
        looks = 0

        def look(due: float) -> None:
            nonlocal looks
            looks += 1
            if self._last_sign(stream) != sign or self.paused_since is not None:
                self._suspected = -1.0
                if self._seconds is not None:
                    self.check()
            elif loop.time() - due > _LATE * seconds and looks < _LOOKS:
                wait()
            else:
                stream.fail(error)

        def wait() -> None:
            due = loop.time() + seconds
            self._timer = loop.call_at(due, look, due)

        if self._timer is not None:
            self._timer.cancel()
        self._suspected = sign
        wait()

    def check(self) -> None:
        """End the stream if it has been silent for too long, or look again when it may have been."""
        stream = self._stream
        if stream is None or self._seconds is None:
            return
        since = self.paused_since or self._last_sign(stream)
        left = since + self._seconds - monotonic()
        if left > 0:
            self._timer = self._loop.call_later(left, self.check)
        elif self.paused_since is not None:
            stream.client_is_silent()
        else:
            stream.engine_is_silent(self._seconds)

    def _last_sign(self, stream: Watched) -> float:
        """When the engine was last heard."""
        return max(self.heard, stream.last_token())
