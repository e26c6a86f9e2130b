"""Errors of legs: failures of an engine, or of the connection to it."""

from __future__ import annotations

from typing import ClassVar

from pd_proxy.errors.base import GatewayError


class BackendError(GatewayError):
    """One leg failed.

    Attributes:
        reason: a word for metrics and logs.
        public: the message for clients, which contains no address.
        unread: True when the engine certainly has not read the request, so that the hand-off in it can still be used.
        blame: False when the failure says nothing about the backend's health, as when the engine closed a kept-alive
            connection while the request was in flight.
        leaves: True when the engine has shown that it is stopping or paused. It gets no new requests for a while.
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
    """More engines have died while they worked on the request than `retries.after_cut` allows."""

    retryable = False
    code = "request_kills_engines"
    reason = "kills_engines"
    public = "every engine that was given this request ended while it worked on it, so no other is given it"


class BackendPreempted(BackendError):
    """The engine ran out of KV blocks and dropped the request (`stop_reason: recomputed`), which has to be sent
    again."""

    code = "backend_preempted"
    reason = "recomputed"
    public = "the engine gave the request up for want of memory"

    def __init__(self, message: str) -> None:
        super().__init__(message, blame=False)


class BackendAborted(BackendError):
    """The engine ended the answer early, with status 200 and `finish_reason: "abort"`. Engines do so when they are
    stopped (SIGTERM), paused, put to sleep or scaled."""

    code = "backend_aborted"
    reason = "aborted"
    public = "the engine stopped before its answer was whole"
    leaves = True


class BackendAnswered(BackendError):
    """The engine answered with an error status. The client gets the engine's own body."""

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
    """The engine is stopping: it finishes its requests, and refuses new ones."""

    code = "backend_stopping"
    reason = "stopping"
    public = "the engine is shutting down"
    leaves = True


class BackendBusy(BackendAnswered):
    code = "backend_busy"
    reason = "busy"
    public = "every engine that was asked is at its limit"


class BackendRejected(BackendAnswered):
    """The engine refused the request as wrong.

    Attributes:
        handled: the engine's request handler has refused it, and not the validation of the body before. vLLM's handler
            has then freed what prefill holds for the request.
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
    """The engine failed after the client had got a part of the answer, and no other engine could continue it.

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
