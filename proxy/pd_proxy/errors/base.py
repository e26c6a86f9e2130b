"""The base class of all errors of the gateway."""

from __future__ import annotations

from typing import ClassVar

import msgspec


class GatewayError(Exception):
    """An error, and the answer that a client gets for it.

    Arguments:
        message: what happened, to what, and what to do about it.
        param: the request's member that is wrong, where there is one.
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
        """The message for the client."""
        return str(self)

    def detail(self) -> dict[str, dict[str, str | None]]:
        """The error as an object, in OpenAI's format."""
        return {"error": {"message": self.public_message, "type": self.type, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        """The answer's body."""
        return msgspec.json.encode(self.detail())

    def event(self) -> bytes:
        """The last event of a stream that had begun."""
        return b"data: " + self.body() + b"\n\n"
