"""The tries whose prefill leg waits until decode's engine has called the gateway back.

A call is for one try, which it names by the id that the gateway made for it and that no other could guess; it is taken
once. A try that has ended, or has been called already, is not known here any more.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from types import TracebackType

import msgspec

from pd_proxy.decoding import Undecodable, json_decoder
from pd_proxy.errors import (
    BackendError,
    BackendGarbled,
    BackendTimedOut,
    CallUnexpected,
    HandoffInvalid,
    InvalidRequest,
)
from pd_proxy.handoff.connector import Connector
from pd_proxy.requests.endpoints import Members

PATH = "/v1/metaserver"

# An engine's external id: its route's prefix, the leg's X-Request-Id, the number of the prompt. Some leave the random
# end there by which vLLM tells requests of one id apart.
_ID = re.compile(r"(?:chatcmpl-([0-9a-f]{32})|cmpl-([0-9a-f]{32})-0)(?:-[0-9a-f]{8})?")


class _Named(msgspec.Struct):
    request_id: str


_read = json_decoder(_Named)


def _name(request_id: str) -> str:
    """The id of a try, from an engine's for its request; empty where it is none of ours."""
    named = _ID.fullmatch(request_id)
    return "" if named is None else named[1] or named[2]


class Call:
    """A try that waits to be called. A context manager; once it is left, no call is taken for the try."""

    def __init__(self, callbacks: Callbacks, name: str, connector: Connector, decode: str) -> None:
        self._callbacks = callbacks
        self._name = name
        self._connector = connector
        self._decode = decode
        self._heard: asyncio.Future[Members] = asyncio.get_running_loop().create_future()

    def take(self, body: bytes) -> None:
        """Take the body of the engine's call.

        Raises:
            HandoffInvalid: it cannot be used. The try ends with that error.
        """
        try:
            heard = self._connector.read_callback(body)
        except HandoffInvalid as error:
            self.fail(BackendGarbled(f"{self._decode}: {error}"))
            raise
        if not self._heard.done():
            self._heard.set_result(heard)

    def fail(self, error: BackendError) -> None:
        """The call will not come: `wait` raises `error`."""
        if not self._heard.done():
            self._heard.set_exception(error)

    async def wait(self, seconds: float) -> Members:
        """Wait for the call. Returns the members that it has for the prefill leg.

        Raises:
            BackendError: no usable call came within `seconds`.
        """
        try:
            async with asyncio.timeout(seconds):
                return await self._heard
        except TimeoutError:
            raise BackendTimedOut(
                f"{self._decode} did not call {self._callbacks.url} within {seconds:g} s; can it reach that?"
            ) from None

    def __enter__(self) -> Call:
        self._callbacks.waiting[self._name] = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._callbacks.waiting.pop(self._name, None)
        if self._heard.done() and not self._heard.cancelled():
            self._heard.exception()  # marks it as retrieved, where the wait was given up
        else:
            self._heard.cancel()


class Callbacks:
    """The tries that wait for a call.

    Arguments:
        home: this gateway's URL, as engines reach it; None where no connector uses callbacks.
        worker: this process's number among those of the gateway. Each id names its own, since a call comes to any.
    Attributes:
        url: the one that engines call.
        waiting: by the id of the try.
    """

    def __init__(self, home: str | None, worker: int = 0) -> None:
        self.url = f"{home}{PATH}" if home is not None else ""
        self.waiting: dict[str, Call] = {}
        self._worker = worker

    def name(self) -> str:
        """An id for a try that no other could guess, however many ids it has seen."""
        return f"{self._worker:02x}{secrets.token_hex(15)}"

    def elsewhere(self, body: bytes) -> int | None:
        """The number of the worker whose try an engine's call is for, where that is another."""
        try:
            name = _name(_read(body).request_id)
        except Undecodable:
            return None
        worker = int(name[:2], 16) if name else self._worker
        return None if worker == self._worker else worker

    def expect(self, name: str, connector: Connector, decode: str) -> Call:
        """A call for the try `name`, from its decode backend."""
        return Call(self, name, connector, decode)

    def called(self, body: bytes) -> None:
        """An engine has called.

        Raises:
            InvalidRequest: it is no such call.
            CallUnexpected: no try waits for it.
        """
        try:
            name = _name(_read(body).request_id)
        except Undecodable as error:
            raise InvalidRequest(f"this is no call of a decode engine: {error}") from None
        call = self.waiting.pop(name, None)
        if call is None:
            raise CallUnexpected("no request waits for this call: it has ended, or has been called before")
        try:
            call.take(body)
        except HandoffInvalid as error:
            raise InvalidRequest(str(error)) from None
