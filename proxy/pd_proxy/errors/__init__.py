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
