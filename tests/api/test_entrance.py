"""The time limit of a whole request, and errors that look like it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pd_proxy.admission.admission import Admission
from pd_proxy.admission.ticket import Ticket
from pd_proxy.api.arrival import Arrival
from pd_proxy.api.entrance import Admitted
from pd_proxy.errors import TotalTimedOut
from pd_proxy.flow.flow import Flow
from pd_proxy.http.response import AsgiResponse
from pd_proxy.settings.tree import build_settings
from pd_proxy.telemetry.records import RequestRecord

from tests.support import chat, pools, until


async def no_message() -> Any:
    raise AssertionError("nothing is read here")


async def no_answer(message: Any) -> None:
    raise AssertionError("nothing is written here")


def admitted(admission: Admission, seconds: float) -> Admitted:
    """The context of a request that may take so many seconds."""
    task = asyncio.current_task()
    assert task is not None
    client = AsgiResponse(no_message, no_answer)
    arrival = Arrival({}, no_message, client, RequestRecord("chat"), task, {}, seconds=seconds)
    ticket = Ticket(admission.clients["anonymous"], model="m", split=True, prefill_tokens=1, tokens=1, size=1)
    return Admitted(admission, arrival, ticket)


@pytest.mark.parametrize("seconds", [30.0, float("inf")])
async def test_a_timeout_error_from_inside_is_not_the_time_limit(seconds: float) -> None:
    admission = Admission(build_settings({}, {}), None)
    fault = TimeoutError("a lookup took too long")
    with pytest.raises(TimeoutError) as caught:
        async with admitted(admission, seconds):
            assert admission.requests == 1
            raise fault
    assert caught.value is fault
    assert admission.requests == 0


async def test_a_time_limit_inside_that_ends_first_is_not_that_of_the_request() -> None:
    admission = Admission(build_settings({}, {}), None)
    with pytest.raises(TimeoutError):
        async with admitted(admission, 30.0), asyncio.timeout(0):
            await asyncio.Event().wait()
    assert admission.requests == 0


async def test_the_time_limit_of_a_request_is_named_in_its_error() -> None:
    admission = Admission(build_settings({}, {}), None)
    with pytest.raises(TotalTimedOut, match=r"the request was not finished within 0\.01 s"):
        async with admitted(admission, 0.01), asyncio.timeout(30):
            await asyncio.Event().wait()
    assert admission.requests == 0
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0


async def test_a_timeout_error_of_the_gateways_own_code_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*arguments: Any) -> None:
        raise TimeoutError

    async with pools(1, 1, timeouts={"total": 30}) as (running, _, _):
        monkeypatch.setattr(Flow, "run", fails)
        answer = await running.http.post("/v1/chat/completions", json=chat())
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        await until(running.idle)
