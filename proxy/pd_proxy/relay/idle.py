"""Time limits for the silence of a stream's engine and of its client.

A stream needs one timer for each idle period, not one for each token. Time in which the client kept the engine waiting
does not count as silence of the engine.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Protocol

from pd_proxy.errors import BackendError
from pd_proxy.http.deadlines import Deadlines

_SUSPECTED = 1.0  # seconds of silence after which the stream of a suspected backend fails
_GAPS = 4  # times the usual gap between tokens, if that is longer, since a slow stream is not dead
_LATE = 0.25  # share of this time by which the event loop may be late; if it is later, the wait is repeated
_CHECKS = 5  # the most times that it waits


class Watched(Protocol):
    """A stream whose silence is watched."""

    def last_token(self) -> float:
        """Time of the last token, as `time.monotonic`; 0 before any."""

    def usual_gap(self) -> float:
        """The mean gap between its tokens, in seconds; 0 before the second."""

    def fail(self, error: BackendError) -> None:
        """End it."""

    def engine_is_silent(self, seconds: float) -> None:
        """Called when the engine has sent nothing for so many seconds."""

    def client_is_silent(self) -> None:
        """Called when the client has read nothing for as long."""


class IdleWatch:
    """Watches one stream for silence.

    Arguments:
        stream: the stream; the reference to it is dropped by `stop`.
        limit: the time of silence after which a stream counts as dead. All streams share its one timer at first; one
            that lasts longer has a timer of its own.
    Attributes:
        last_read: time of the engine's last read outside of the fast path, as `time.monotonic`.
        paused_since: since when the client has kept the engine waiting, as `time.monotonic`; None where it does not.
    """

    __slots__ = ("_limit", "_loop", "_stream", "_suspected", "_timer", "last_read", "paused_since")

    def __init__(self, stream: Watched, loop: asyncio.AbstractEventLoop, limit: Deadlines) -> None:
        self._stream: Watched | None = stream
        self._loop = loop
        self._limit = limit
        self._timer: asyncio.TimerHandle | None = None
        self._suspected = -1.0  # `_last_sign` when the suspicion began that is being checked
        self.last_read = 0.0
        self.paused_since: float | None = None

    def start(self) -> None:
        """Start to count silence."""
        self._limit.watch(self, self._loop)

    def overdue(self, seconds: float) -> None:
        """Called when the limit has passed since `start`."""
        self.check()

    def stop(self) -> None:
        """Stop watching: the stream is over."""
        self._stream = None
        self._cancel()

    def _cancel(self) -> None:
        self._limit.forget(self)
        if self._timer is not None:
            self._timer.cancel()

    def pause(self) -> None:
        """Called when the client does not keep up."""
        self.paused_since = monotonic()

    def resume(self) -> None:
        """Called when the client keeps up again."""
        self.paused_since = None
        self.last_read = monotonic()

    def suspect(self, error: BackendError) -> None:
        """Check a stream whose backend fails its health checks. If it is silent from now on, it fails with `error`
        after `_SUSPECTED` seconds, or after `_GAPS` times its usual gap between tokens. Otherwise it goes on.

        Silence before the call does not count, since the gateway itself may have been stopped and have read nothing.
        Neither does a time in which the event loop was late."""
        stream = self._stream
        if self.paused_since is not None or stream is None:
            return  # the client keeps the engine waiting
        loop, sign = self._loop, self._last_sign(stream)
        if self._suspected == sign:
            return  # it is being checked already
        seconds = max(_SUSPECTED, _GAPS * stream.usual_gap())
        if self._limit.seconds is not None:
            seconds = min(seconds, self._limit.seconds)
        checks = 0

        def check_again(due: float) -> None:
            nonlocal checks
            checks += 1
            if self._last_sign(stream) != sign or self.paused_since is not None:
                self._suspected = -1.0
                self.check()
            elif loop.time() - due > _LATE * seconds and checks < _CHECKS:
                wait()
            else:
                stream.fail(error)

        def wait() -> None:
            due = loop.time() + seconds
            self._timer = loop.call_at(due, check_again, due)

        self._cancel()
        self._suspected = sign
        wait()

    def check(self) -> None:
        """End the stream if it has been silent for too long; otherwise set the timer for the earliest time at which it
        could be."""
        stream, seconds = self._stream, self._limit.seconds
        if stream is None or seconds is None:
            return
        since = self.paused_since or self._last_sign(stream)
        left = since + seconds - monotonic()
        if left > 0:
            self._timer = self._loop.call_later(left, self.check)
        elif self.paused_since is not None:
            stream.client_is_silent()
        else:
            stream.engine_is_silent(seconds)

    def _last_sign(self, stream: Watched) -> float:
        """The time of the engine's last token or read."""
        return max(self.last_read, stream.last_token())
