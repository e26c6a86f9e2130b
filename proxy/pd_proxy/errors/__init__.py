"""Every error that the gateway can answer with.

Each class fixes the HTTP status, the OpenAI `type` and `code`, and whether another try may help.

    GatewayError                       500
    ├── ClientError                    400  the request has an error
    │   ├── InvalidRequest             400
    │   ├── TooManyTokens              400  the request alone is above a bound of admission
    │   ├── Unauthorized               401
    │   ├── Forbidden                  403
    │   ├── RouteNotFound              404
    │   ├── ModelNotFound              404
    │   ├── BackendNotFound            404
    │   ├── ResponseNotFound           404
    │   ├── CallUnexpected             404  an engine called back, and no request waits for it
    │   ├── MethodNotAllowed           405
    │   ├── RequestTimedOut            408
    │   ├── BodyTooLarge               413
    │   ├── EncodingNotSupported       415
    │   ├── RateLimited                429  the client is at its own bound
    │   ├── HeadersTooLarge            431
    │   └── VersionNotSupported        505  neither HTTP/1.1 nor HTTP/1.0
    ├── Unavailable                    503  no engine was asked
    │   ├── NoBackend                  503
    │   ├── TooManyConnections         503
    │   ├── BodiesFull                 503
    │   ├── Draining                   503
    │   ├── QueueFull                  503  the queue is full
    │   ├── DeadlineTooClose           503  its turn would not come in time
    │   ├── TargetMissed               503  its first token would be late
    │   └── QueueTimedOut              503  its turn did not come in time
    ├── TotalTimedOut                  504  the time limit of the request expired
    ├── LoopDetected                   508  the gateway's backends lead back to itself
    ├── FanOutFailed                   502  an operator's call failed on some backend
    └── BackendError                   502  one leg failed; another try may help
        ├── BackendUnreachable         502  no connection, so the engine read nothing
        ├── BackendCut                 502  the connection ended before the answer was whole
        ├── BackendGarbled             502  the answer was malformed
        ├── BackendTimedOut            504
        ├── BackendLost                502  the backend failed its health checks while the leg waited
        ├── BackendPreempted           502  the engine dropped the request to free its memory
        ├── BackendsKilled             502  several engines died while they had the request; never retried
        ├── BackendAborted             502  the engine ended the answer early: it is stopping, or paused
        ├── BackendAnswered                 the engine answered with an error
        │   ├── BackendFailed          5xx  an error of the engine's own
        │   │   └── BackendStopping    503  the engine refuses new requests, since it is shutting down
        │   ├── BackendBusy            429 or 503 from the engine's HTTP server, so the engine read nothing
        │   └── BackendRejected        4xx  the engine refused the request itself; never retried
        │       └── BackendLacksModel  404  the engine does not have the model (any more); another one may
        ├── HandoffInvalid             502  prefill's hand-off parameters would harm decode
        ├── HandoffExpired             504  the hand-off became too old to be sent
        ├── HandoffUnconfirmed         504  prefill did not report that its KV cache has arrived at decode
        └── StreamInterrupted          502  a stream broke, and could not be continued; never retried

Messages of `BackendError` name backends and are for logs. `public_message` is the message for the client, which
contains no address of an engine.
"""

from __future__ import annotations

from pd_proxy.errors.base import GatewayError
from pd_proxy.errors.gateway import (
    BackendNotFound,
    BodiesFull,
    BodyTooLarge,
    CallUnexpected,
    ClientError,
    DeadlineTooClose,
    Draining,
    EncodingNotSupported,
    FanOutFailed,
    Forbidden,
    HeadersTooLarge,
    InvalidRequest,
    LoopDetected,
    MethodNotAllowed,
    ModelNotFound,
    NoBackend,
    QueueFull,
    QueueTimedOut,
    RateLimited,
    RequestTimedOut,
    ResponseNotFound,
    RouteNotFound,
    TargetMissed,
    TooManyConnections,
    TooManyTokens,
    TotalTimedOut,
    Unauthorized,
    Unavailable,
    VersionNotSupported,
)
from pd_proxy.errors.legs import (
    BackendAborted,
    BackendAnswered,
    BackendBusy,
    BackendCut,
    BackendError,
    BackendFailed,
    BackendGarbled,
    BackendLacksModel,
    BackendLost,
    BackendPreempted,
    BackendRejected,
    BackendsKilled,
    BackendStopping,
    BackendTimedOut,
    BackendUnreachable,
    HandoffExpired,
    HandoffInvalid,
    HandoffUnconfirmed,
    StreamInterrupted,
)

__all__ = [
    "BackendAborted",
    "BackendAnswered",
    "BackendBusy",
    "BackendCut",
    "BackendError",
    "BackendFailed",
    "BackendGarbled",
    "BackendLacksModel",
    "BackendLost",
    "BackendNotFound",
    "BackendPreempted",
    "BackendRejected",
    "BackendStopping",
    "BackendTimedOut",
    "BackendUnreachable",
    "BackendsKilled",
    "BodiesFull",
    "BodyTooLarge",
    "CallUnexpected",
    "ClientError",
    "DeadlineTooClose",
    "Draining",
    "EncodingNotSupported",
    "FanOutFailed",
    "Forbidden",
    "GatewayError",
    "HandoffExpired",
    "HandoffInvalid",
    "HandoffUnconfirmed",
    "HeadersTooLarge",
    "InvalidRequest",
    "LoopDetected",
    "MethodNotAllowed",
    "ModelNotFound",
    "NoBackend",
    "QueueFull",
    "QueueTimedOut",
    "RateLimited",
    "RequestTimedOut",
    "ResponseNotFound",
    "RouteNotFound",
    "StreamInterrupted",
    "TargetMissed",
    "TooManyConnections",
    "TooManyTokens",
    "TotalTimedOut",
    "Unauthorized",
    "Unavailable",
    "VersionNotSupported",
]
