"""Errors of legs: what an engine, or the way to it, has failed at."""

from __future__ import annotations

from typing import ClassVar

from pd_proxy.errors.base import GatewayError


class BackendError(GatewayError):
    """One leg failed.

    Attributes:
        reason: one short word for metrics and logs.
        unread: True when the engine surely never read the request, so that a hand-off it carried is still good.
        blame: False when the failure says nothing about the backend's health (a kept-alive connection that the
            engine closed as the request was on its way).
        leaves: True when the engine has shown that it is stopping or paused: it gets no new requests for a while.
    """

    status = 502
    type = "backend_error"
    code = "backend_error"
    retryable = True
    reason: ClassVar[str] = "error"
    public: ClassVar[str] = "the engine that served this request failed"
    leaves: ClassVar[bool] = False

    def __init__(self, message: str, *, unread: bool = False, blame: bool = True) -> None:
        super().__init__(message)
        self.unread = unread
        self.blame = blame

    @property
    def public_message(self) -> str:
        return self.public


class BackendUnreachable(BackendError):
    code = "backend_unreachable"
    reason = "unreachable"
    public = "no engine could be reached"

    def __init__(self, message: str, *, blame: bool = True) -> None:
        super().__init__(message, unread=True, blame=blame)


class BackendCut(BackendError):
    code = "backend_cut"
    reason = "cut"
    public = "the engine's connection ended before its answer was whole"


class BackendGarbled(BackendError):
    code = "backend_garbled"
    reason = "garbled"
    public = "the engine's answer could not be understood"


class BackendTimedOut(BackendError):
    status = 504
    type = "timeout"
    code = "backend_timeout"
    reason = "timeout"
    public = "the engine did not answer in time"


class BackendLost(BackendError):
    code = "backend_lost"
    reason = "lost"
    public = "the engine stopped answering its health checks"


class BackendsKilled(BackendError):
    """As many engines have ended while they worked on the request as `retries.after_cut` allows, and one more."""

    retryable = False
    code = "request_kills_engines"
    reason = "kills_engines"
    public = "every engine that was given this request ended while it worked on it, so no other is given it"


class BackendPreempted(BackendError):
    """`stop_reason: recomputed`: the engine ran out of KV blocks and wants the request to be made again."""

    code = "backend_preempted"
    reason = "recomputed"
    public = "the engine gave the request up for want of memory"

    def __init__(self, message: str) -> None:
        super().__init__(message, blame=False)


class BackendAborted(BackendError):
    """The engine ended a request before its time and called that an answer, status 200: `finish_reason: "abort"`. So
    engines do that are stopped (SIGTERM), paused, put to sleep or scaled."""

    code = "backend_aborted"
    reason = "aborted"
    public = "the engine stopped before its answer was whole"
    leaves = True


class BackendAnswered(BackendError):
    """The engine answered with an error status; its own body is kept and given to the client."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        answer: bytes | None = None,
        engine_message: str | None = None,
        retry_after: int | None = None,
        unread: bool = False,
    ) -> None:
        super().__init__(message, unread=unread)
        self.status = status
        self.retry_after = retry_after
        self._answer = answer
        self._engine_message = engine_message

    @property
    def public_message(self) -> str:
        return self._engine_message or self.public

    def body(self) -> bytes:
        return self._answer or super().body()


class BackendFailed(BackendAnswered):
    code = "backend_failed"
    reason = "failed"
    public = "the engine answered with an internal error"


class BackendStopping(BackendFailed):
    """The engine has been told to stop, ends what it has, and refuses whatever comes."""

    code = "backend_stopping"
    reason = "stopping"
    public = "the engine is shutting down"
    leaves = True


class BackendBusy(BackendAnswered):
    code = "backend_busy"
    reason = "busy"
    public = "every engine that was asked is at its limit"


class BackendRejected(BackendAnswered):
    """Attributes:
    handled: it was the engine's handler that refused, and not what checks a body before it. vLLM's has freed what
        prefill holds for the request then.
    """

    handled: bool = False
    retryable = False
    code = "rejected"
    reason = "rejected"
    public = "the engine refused the request"


class BackendLacksModel(BackendRejected):
    retryable = True
    code = "model_not_found"
    reason = "lacks_model"
    public = "no engine has this model any more"


class HandoffInvalid(BackendError):
    code = "handoff_invalid"
    reason = "handoff_invalid"
    public = "prefill's hand-off could not be used"


class HandoffExpired(BackendError):
    status = 504
    code = "handoff_expired"
    reason = "handoff_expired"
    public = "the hand-off between the engines took too long"


class HandoffUnconfirmed(BackendError):
    status = 504
    code = "handoff_unconfirmed"
    reason = "handoff_unconfirmed"
    public = "prefill's KV cache did not arrive at decode in time"


class StreamInterrupted(BackendError):
    """The engine failed after a part of its answer had been given, and nobody could go on from there.

    Arguments:
        why: the reason, one of those in docs/resume.md.
    """

    retryable = False
    code = "stream_interrupted"
    reason = "interrupted"

    def __init__(self, message: str, *, why: str) -> None:
        super().__init__(message)
        self.why = why

    @property
    def public_message(self) -> str:
        return f"the engine failed in mid-answer, and the answer could not be continued ({self.why})"
