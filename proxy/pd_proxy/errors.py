"""Every error the gateway can answer with.

Each class fixes the HTTP status, the OpenAI `type` and `code`, and whether another try may help.

    GatewayError                       500
    ├── ClientError                    400  the client's to mend
    │   ├── InvalidRequest             400
    │   ├── TooManyTokens              400  more than a bound of admission allows at all
    │   ├── Unauthorized               401
    │   ├── Forbidden                  403
    │   ├── RouteNotFound              404
    │   ├── ModelNotFound              404
    │   ├── BackendNotFound            404
    │   ├── ResponseNotFound           404
    │   ├── CallUnexpected             404  an engine called back for what nobody waits for
    │   ├── MethodNotAllowed           405
    │   ├── RequestTimedOut            408
    │   ├── BodyTooLarge               413
    │   ├── EncodingNotSupported       415
    │   ├── RateLimited                429  this client's own bound
    │   ├── HeadersTooLarge            431
    │   └── VersionNotSupported        505  a version of HTTP that is not spoken here
    ├── Unavailable                    503  no engine was asked
    │   ├── NoBackend                  503
    │   ├── TooManyConnections         503
    │   ├── BodiesFull                 503
    │   ├── Draining                   503
    │   ├── QueueFull                  503  the service's bounds: nobody else may wait
    │   ├── DeadlineTooClose           503  it would not be its turn in time
    │   ├── TargetMissed               503  its first token would be late
    │   └── QueueTimedOut              503  it was not its turn in time
    ├── TotalTimedOut                  504  the request's own time ran out
    ├── LoopDetected                   508  the gateway's backends lead back to itself
    ├── FanOutFailed                   502  an operator's call did not go well on every backend
    └── BackendError                   502  one leg failed; another try may help
        ├── BackendUnreachable         502  no connection: nothing was read by the engine
        ├── BackendCut                 502  the connection ended before the answer was whole
        ├── BackendGarbled             502  the answer was not what an engine says
        ├── BackendTimedOut            504
        ├── BackendLost                502  health checks gave the backend up while the leg waited
        ├── BackendPreempted           502  the engine dropped the request to get at its memory
        ├── BackendsKilled             502  several engines ended while they had the request; never retried
        ├── BackendAborted             502  the engine ended the answer before its time: it is stopping, or paused
        ├── BackendFailed              5xx  the engine answered with an error of its own
        │   └── BackendStopping        503  the engine refuses new requests: it ends those it has, and then itself
        ├── BackendBusy                429 or 503 from the engine's front door: nothing was read
        ├── HandoffInvalid             502  prefill's hand-off parameters would harm decode
        ├── HandoffExpired             504  the hand-off grew too old to be sent
        ├── HandoffUnconfirmed         504  prefill did not say that its KV cache has arrived at decode
        ├── StreamInterrupted          502  a stream broke, and could not be continued; never retried
        └── BackendRejected            4xx  the engine refused the request itself; never retried
            └── BackendLacksModel      404  the engine does not have the model (any more); another may

Messages of `BackendError` name backends and are for logs; `public_message` is what a client reads, since an
engine's address is nobody's business outside.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec


class GatewayError(Exception):
    """An error with its answer.

    Arguments:
        message: what happened, to what, and what to do about it.
        param: the request field at fault, where there is one.
        retry_after: seconds after which the client may try again.
    """

    status: int = 500
    type: ClassVar[str] = "internal_error"
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after = retry_after

    @property
    def public_message(self) -> str:
        """What a client is told."""
        return str(self)

    def detail(self) -> dict[str, dict[str, str | None]]:
        """What happened, in OpenAI's shape."""
        return {"error": {"message": self.public_message, "type": self.type, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        """The answer's body."""
        return msgspec.json.encode(self.detail())

    def event(self) -> bytes:
        """The same as the last event of a stream that had begun."""
        return b"data: " + self.body() + b"\n\n"


class ClientError(GatewayError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidRequest(ClientError):
    """The body is not JSON, not an object, or a field the gateway must read has the wrong type."""


class TooManyTokens(ClientError):
    """By its size alone the request is above a bound of admission, so that no wait would help."""

    code = "too_many_tokens"


class Unauthorized(ClientError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(ClientError):
    status = 403
    type = "permission_error"
    code = "forbidden"


class RouteNotFound(ClientError):
    status = 404
    code = "unknown_route"


class ModelNotFound(ClientError):
    status = 404
    code = "model_not_found"


class BackendNotFound(ClientError):
    """An operator named a backend that is not in the fleet."""

    status = 404
    code = "backend_not_found"


class ResponseNotFound(ClientError):
    """No backend has a stored response of this client's by that id."""

    status = 404
    code = "response_not_found"


class CallUnexpected(ClientError):
    """An engine has called back for a request that does not wait for it, or not any more."""

    status = 404
    code = "call_unexpected"


class MethodNotAllowed(ClientError):
    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class RequestTimedOut(ClientError):
    """The client took too long to send its headers or its body."""

    status = 408
    code = "request_timeout"


class BodyTooLarge(ClientError):
    status = 413
    code = "body_too_large"


class EncodingNotSupported(ClientError):
    """The body has a content-encoding that is not taken off here."""

    status = 415
    code = "encoding_not_supported"


class RateLimited(ClientError):
    """The client has as much in the gateway as its settings allow it."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class HeadersTooLarge(ClientError):
    status = 431
    code = "headers_too_large"


class VersionNotSupported(ClientError):
    """The request is in another version of HTTP than 1.1 or 1.0."""

    status = 505
    code = "http_version_not_supported"


class Unavailable(GatewayError):
    status = 503
    type = "service_unavailable"
    code = "unavailable"


class NoBackend(Unavailable):
    """No backend that could serve the request is up."""

    code = "no_backend"


class TooManyConnections(Unavailable):
    """`limits.connections` are open already."""

    code = "too_many_connections"


class BodiesFull(Unavailable):
    """`limits.bodies` are held already."""

    code = "bodies_full"


class Draining(Unavailable):
    """The gateway is shutting down and takes no new request."""

    code = "draining"


class QueueFull(Unavailable):
    """The bounds of admission are reached, and so is the length of the queue."""

    code = "queue_full"


class DeadlineTooClose(Unavailable):
    """The queue empties too slowly for the request's deadline; it is told so at once."""

    code = "deadline_too_close"


class TargetMissed(Unavailable):
    """The request would get its first token later than its target has it (`admission.slo: refuse`)."""

    code = "target_missed"


class QueueTimedOut(Unavailable):
    """The request's deadline came while it waited."""

    code = "queue_timeout"


class TotalTimedOut(GatewayError):
    """`timeouts.total`, or the client's own `x-request-timeout`, ran out."""

    status = 504
    type = "timeout"
    code = "total_timeout"


class LoopDetected(GatewayError):
    """The request has come back to this gateway, or has come through too many of them."""

    status = 508
    type = "loop_detected"
    code = "loop_detected"


class FanOutFailed(GatewayError):
    """What an operator wanted of several backends did not go well on all of them; the answer says on which."""

    status = 502
    type = "backend_error"
    code = "fan_out_failed"


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
