"""The errors with which the simulated engine refuses requests, in the shapes of vLLM's API server.

Invariant: every refusal that a client sees is one of these. A `late` error is one that was raised after the handler had
accepted the request; that is when a decode engine notifies prefill to release a hand-off.
"""

from __future__ import annotations


class RequestError(Exception):
    """An answer other than 200: HTTP status, error type, message and the parameter at fault."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        param: str | None = None,
        *,
        late: bool = True,
        is_output: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param
        self.late = late
        self.is_output = is_output  # the request's output ended with this error, so a stream has begun before

    def body(self) -> dict[str, object]:
        """The JSON body of the answer."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return {"error": error}

    def anthropic_body(self) -> dict[str, object]:
        """The JSON body as the handler of `/v1/messages` writes it."""
        return {"type": "error", "error": {"type": self.kind, "message": self.message}}


def bad_request(message: str, param: str | None = None) -> RequestError:
    """The error for a value that the handler refuses."""
    return RequestError(400, "BadRequestError", message, param)


def invalid_field(field: str, kind: str, message: str, given: object) -> RequestError:
    """The error for a body of the wrong shape, as pydantic words it. It is raised before the handler."""
    shown = repr(given)
    detail = f"{{'type': '{kind}', 'loc': ('body', '{field}'), 'msg': '{message}', 'input': {shown[:200]}}}"
    return RequestError(400, "Bad Request", f"1 validation error:\n  {detail}", field, late=False)


def internal_error() -> RequestError:
    """The error of a request that ended with finish reason "error"."""
    return RequestError(500, "InternalServerError", "Internal server error", is_output=True)


def engine_dead() -> RequestError:
    """The error of requests to an engine core that has died."""
    message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    return RequestError(500, "InternalServerError", message)
