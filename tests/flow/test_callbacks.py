"""Tries that wait for a call: which calls they take, and how the wait ends."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from pd_proxy.errors import BackendGarbled, BackendLost, BackendTimedOut, CallUnexpected, InvalidRequest
from pd_proxy.flow.callbacks import Call, Callbacks
from pd_proxy.handoff.connectors.registry import CONNECTORS

from tests.handoff.helpers import CALL

NAME = "0123456789abcdef0123456789abcdef"
DECODE = "http://10.0.0.2:8000"


def callbacks() -> Callbacks:
    return Callbacks("http://10.0.0.1:8000")


def expect(waiting: Callbacks, name: str = NAME) -> Call:
    return waiting.expect(name, CONNECTORS["ascend_layerwise"], DECODE)


def body(request_id: Any = f"chatcmpl-{NAME}", **changes: Any) -> bytes:
    return json.dumps({**CALL, "request_id": request_id, **changes}).encode()


def test_names_cannot_be_guessed_from_others() -> None:
    names = {callbacks().name() for _ in range(1000)}
    assert len(names) == 1000
    assert {len(name) for name in names} == {32}


def test_a_name_identifies_its_worker() -> None:
    ours, theirs = Callbacks("http://a", 3), Callbacks("http://a", 63)
    for name in (ours.name(), theirs.name()):
        assert ours.elsewhere(body(f"chatcmpl-{name}")) == (63 if name.startswith("3f") else None)
        assert theirs.elsewhere(body(f"cmpl-{name}-0")) == (3 if name.startswith("03") else None)
    for unclaimed_pushes in (b"", b"[]", body("chatcmpl-63"), body("")):
        assert ours.elsewhere(unclaimed_pushes) is None


@pytest.mark.parametrize(
    "request_id", [f"chatcmpl-{NAME}", f"cmpl-{NAME}-0", f"chatcmpl-{NAME}-0a1b2c3d", f"cmpl-{NAME}-0-0a1b2c3d"]
)
async def test_a_try_is_named_as_engines_name_it(request_id: str) -> None:
    waiting = callbacks()
    with expect(waiting) as call:
        waiting.called(body(request_id))
        assert json.loads(bytes((await call.wait(1))["kv_transfer_params"]))["request_id"] == request_id


@pytest.mark.parametrize(
    "request_id", [NAME, f"chatcmpl-{NAME[:-1]}0", f"cmpl-{NAME}-1", f"cmpl-{NAME}", f"x-chatcmpl-{NAME}", ""]
)
async def test_no_other_try_takes_the_call(request_id: str) -> None:
    waiting = callbacks()
    with expect(waiting) as call:
        with pytest.raises(CallUnexpected):
            waiting.called(body(request_id))
        waiting.called(body())
        await call.wait(1)


async def test_a_call_is_taken_once_and_none_after_the_end() -> None:
    waiting = callbacks()
    with expect(waiting):
        waiting.called(body())
        with pytest.raises(CallUnexpected):
            waiting.called(body())
    with expect(waiting):
        pass
    with pytest.raises(CallUnexpected):
        waiting.called(body())
    assert not waiting.waiting


@pytest.mark.parametrize("garbage", [b"", b"[]", b"{}", b'{"request_id": 1}', b"\xff", b"[" * 100_000])
async def test_a_body_that_is_not_a_call_is_refused_and_ends_no_try(garbage: bytes) -> None:
    waiting = callbacks()
    with expect(waiting) as call:
        with pytest.raises(InvalidRequest):
            waiting.called(garbage)
        waiting.called(body())
        await call.wait(1)


async def test_a_call_that_cannot_be_used_ends_its_try_at_once() -> None:
    waiting = callbacks()
    with expect(waiting) as call:
        with pytest.raises(InvalidRequest):
            waiting.called(body(remote_port=-1))
        with pytest.raises(BackendGarbled, match=DECODE):
            await call.wait(60)


async def test_waiting_ends() -> None:
    waiting = callbacks()
    with expect(waiting) as call, pytest.raises(BackendTimedOut, match=r"did not call \S+/v1/metaserver within 0.01 s"):
        await call.wait(0.01)
    with expect(waiting) as call:
        asyncio.get_running_loop().call_soon(call.fail, BackendLost("prefill is gone"))
        with pytest.raises(BackendLost):
            await call.wait(60)
