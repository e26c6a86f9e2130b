"""Errors that no engine has caused: errors of the client's request, and errors from the gateway's bounds and state."""

from __future__ import annotations

from pd_proxy.errors.base import GatewayError


class ClientError(GatewayError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidRequest(ClientError):
    """The body is not a JSON object, or a member that the gateway reads has the wrong type."""


class TooManyTokens(ClientError):
    """The request alone exceeds a bound of admission, so waiting would not help."""

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
    """No backend has stored a response of this client with that id."""

    status = 404
    code = "response_not_found"


class CallUnexpected(ClientError):
    """An engine has called back, and no request waits for that call, or no longer."""

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
    """The body has a content-encoding that the gateway cannot decode."""

    status = 415
    code = "encoding_not_supported"


class RateLimited(ClientError):
    """The client has reached the bound of its requests or tokens in the gateway."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class HeadersTooLarge(ClientError):
    status = 431
    code = "headers_too_large"


class VersionNotSupported(ClientError):
    """The request's version of HTTP is neither 1.1 nor 1.0."""

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
    """As many connections as `limits.connections` are open."""

    code = "too_many_connections"


class BodiesFull(Unavailable):
    """The bodies of running requests take up `limits.bodies`."""

    code = "bodies_full"


class Draining(Unavailable):
    """The gateway is shutting down and takes no new request."""

    code = "draining"


class QueueFull(Unavailable):
    """The bounds of admission are reached, and the queue is full."""

    code = "queue_full"


class DeadlineTooClose(Unavailable):
    """The queue empties too slowly for the request's deadline, so it is refused at once."""

    code = "deadline_too_close"


class TargetMissed(Unavailable):
    """The request would get its first token later than its target (`admission.slo: refuse`)."""

    code = "target_missed"


class QueueTimedOut(Unavailable):
    """The request's deadline passed while it waited in the queue."""

    code = "queue_timeout"


class TotalTimedOut(GatewayError):
    """The time limit of the request expired: `timeouts.total`, or the client's `x-request-timeout`."""

    status = 504
    type = "timeout"
    code = "total_timeout"


class LoopDetected(GatewayError):
    """The request has come back to this gateway, or has passed through too many gateways."""

    status = 508
    type = "loop_detected"
    code = "loop_detected"


class FanOutFailed(GatewayError):
    """An operator's request to several backends failed on some. The answer says on which."""

    status = 502
    type = "backend_error"
    code = "fan_out_failed"
