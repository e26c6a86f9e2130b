"""Matches the calls of decode engines to the tries whose prefill leg waits for them.

A call names its try by the id that the gateway made for it, which cannot be guessed. Each try takes one call. A try
that has ended, or that has been called, is no longer known here.
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

# An engine's external id: the prefix of its route, the leg's X-Request-Id, and the number of the prompt. Some engines
# keep the random suffix by which vLLM distinguishes requests with one id.
_ID = re.compile(r"(?:chatcmpl-([0-9a-f]{32})|cmpl-([0-9a-f]{32})-0)(?:-[0-9a-f]{8})?")


class _Named(msgspec.Struct):
    request_id: str


_read = json_decoder(_Named)


def _name(request_id: str) -> str:
    """The id of a try, from the engine's id of its request; empty where it is not one of this gateway's."""
    named = _ID.fullmatch(request_id)
    return "" if named is None else named[1] or named[2]


class Call:
    """A try that waits for a call. A context manager; after it is left, no call is taken for the try."""

    def __init__(self, callbacks: Callbacks, name: str, connector: Connector, decode: str) -> None:
        self._callbacks = callbacks
        self._name = name
        self._connector = connector
        self._decode = decode
        self._called: asyncio.Future[Members] = asyncio.get_running_loop().create_future()

    def take(self, body: bytes) -> None:
        """Take the body of the engine's call.

        Raises:
            HandoffInvalid: the call cannot be used. The try fails.
        """
        try:
            members = self._connector.read_callback(body)
        except HandoffInvalid as error:
            self.fail(BackendGarbled(f"{self._decode}: {error}"))
            raise
        if not self._called.done():
            self._called.set_result(members)

    def fail(self, error: BackendError) -> None:
        """The call will not come: `wait` raises `error`."""
        if not self._called.done():
            self._called.set_exception(error)

    async def wait(self, seconds: float) -> Members:
        """Wait for the call. Returns its members for the prefill leg.

        Raises:
            BackendError: no usable call came within `seconds`.
        """
        try:
            async with asyncio.timeout(seconds):
                return await self._called
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
        if self._called.done() and not self._called.cancelled():
            self._called.exception()  # the exception is retrieved, since the wait may have been given up
        else:
            self._called.cancel()


class Callbacks:
    """The tries that wait for a call.

    Arguments:
        home: the URL at which engines reach this gateway; None where no connector uses callbacks.
        worker: the number of this worker process. Each id has it, since a call may arrive at any worker.
    Attributes:
        url: the URL that engines call.
        waiting: the calls that are expected, by the id of their try.
    """

    def __init__(self, home: str | None, worker: int = 0) -> None:
        self.url = f"{home}{PATH}" if home is not None else ""
        self.waiting: dict[str, Call] = {}
        self._worker = worker

    def name(self) -> str:
        """An id for a try. It cannot be guessed, however many other ids are known."""
        return f"{self._worker:02x}{secrets.token_hex(15)}"

    def elsewhere(self, body: bytes) -> int | None:
        """The number of the worker that a call is for; None where it is for this one, or cannot be read."""
        try:
            name = _name(_read(body).request_id)
        except Undecodable:
            return None
        worker = int(name[:2], 16) if name else self._worker
        return None if worker == self._worker else worker

    def expect(self, name: str, connector: Connector, decode: str) -> Call:
        """Expect a call from the decode backend of the try `name`."""
        return Call(self, name, connector, decode)

    def called(self, body: bytes) -> None:
        """An engine has called.

        Raises:
            InvalidRequest: the body is not such a call.
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
