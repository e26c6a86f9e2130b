"""Exceptions that escape from the gateway's own code: the client gets an error in its API's form, and the log and the
metrics have it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from pd_proxy.flow.legs import Legs
from pd_proxy.flow.placing import Placing
from pd_proxy.flow.single import Single
from pd_proxy.handoff.plan import Plan
from pd_proxy.telemetry.records import RequestRecord, Sinks

from tests.support import Running, chat, pools, running_gateway, simulators, until

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat(),
    "/v1/completions": {"model": "sim", "prompt": "a", "max_tokens": 4},
    "/v1/messages": {"model": "sim", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4},
    "/v1/responses": {"model": "sim", "input": "a"},
    "/v1/embeddings": {"model": "sim", "input": "a"},
}


class Fault(Exception):
    """An exception that no package catches."""


def fails(*arguments: object, **named: object) -> Any:
    raise Fault("the secret is 42")


async def check_all(running: Running, endpoint_errors: int) -> None:
    """Check that nothing is in flight, and that the faults were counted as internal errors."""
    await until(running.idle)
    metrics = await running.metrics()
    counted = {name: value for name, value in metrics.items() if name.startswith("pd_proxy_requests_total")}
    assert not any('outcome=""' in name for name in counted)
    assert sum(value for name, value in counted.items() if 'outcome="internal_error"' in name) == endpoint_errors


@pytest.mark.parametrize("place", [(Placing, "decide"), (Legs, "_send"), (Plan, "take")])
async def test_a_fault_in_any_part_is_a_500_in_the_apis_form(
    place: tuple[type, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with pools(1, 1) as (running, _, _):
        monkeypatch.setattr(*place, fails)
        for path in ("/v1/chat/completions", "/v1/messages"):
            for stream in (False, True):
                caplog.clear()
                answer = await running.http.post(
                    path, json={**ROUTES[path], "stream": stream}, headers={"x-request-id": "mine"}
                )
                assert answer.status_code == 500
                assert answer.headers["x-request-id"] == "mine"
                error = answer.json()["error"]
                assert error["type"] == ("api_error" if path == "/v1/messages" else "internal_error")
                assert "its log says more" in error["message"]
                assert "42" not in answer.text
                [line] = [line for line in caplog.records if line.levelno == logging.ERROR and line.exc_info]
                assert "mine" in line.getMessage()
        await check_all(running, 4)


async def test_a_fault_on_a_one_leg_route_is_a_500_in_the_apis_form(monkeypatch: pytest.MonkeyPatch) -> None:
    async with simulators("mixed") as [engine], running_gateway(mixed=[engine.url]) as running:
        monkeypatch.setattr(Single, "_try", fails)
        answer = await running.http.post("/v1/embeddings", json=ROUTES["/v1/embeddings"])
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        await check_all(running, 1)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
async def test_a_fault_in_a_stream_that_has_begun_is_an_error_event(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Legs.decode_stream

    async def fails_at_the_end(*arguments: Any) -> None:
        await run(*arguments)
        raise Fault

    async with simulators("mixed") as [engine], running_gateway(mixed=[engine.url]) as running:
        monkeypatch.setattr("pd_proxy.http.server_exchange.ServerExchange.end", lambda client, data=b"": None)
        monkeypatch.setattr(Legs, "decode_stream", fails_at_the_end)
        async with running.http.stream("POST", path, json={**ROUTES[path], "stream": True}) as answer:
            assert answer.status_code == 200
            seen = b""
            async for data in answer.aiter_raw():
                seen += data
                if b"its log says more" in seen:
                    break
        assert b"its log says more" in seen.split(b"\n\n")[-2]
        await check_all(running, 1)


async def test_an_error_that_cannot_be_written_is_replaced_by_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async with simulators("mixed") as [engine], running_gateway(mixed=[engine.url]) as running:
        monkeypatch.setattr("pd_proxy.api.exchange._give", fails)
        answer = await running.http.post("/v1/chat/completions", content=b"no JSON")
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert answer.headers["x-request-id"]


def test_a_sink_that_fails_does_not_disturb_the_others() -> None:
    heard = []

    class Sink:
        gaps = handoff_released = None

        def finished(self, record: RequestRecord) -> None:
            heard.append(record)
            raise Fault

    Sinks(Sink(), Sink()).finished(RequestRecord("chat"))  # type: ignore[arg-type]
    assert len(heard) == 2


async def test_a_request_that_fails_before_it_has_an_id_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async with simulators("mixed") as [engine], running_gateway(mixed=[engine.url]) as running:
        monkeypatch.setattr("pd_proxy.api.exchange.introduce", fails)
        answer = await running.http.post("/v1/chat/completions", json=chat())
        assert answer.status_code == 500
        assert len(answer.headers["x-request-id"]) >= 16
