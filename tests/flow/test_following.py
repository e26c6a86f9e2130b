"""One request can be followed from its client's id to the gateway's log lines, to the engines' logs, and back."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import pytest
from pd_proxy.flow.request import leg_id
from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy_simulator import Simulator

from tests.contract.cases import IDS, MOST, Case, fleet
from tests.support import PROMPT, chat, completion, pools

pytestmark = pytest.mark.cross_product

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TRACE = {
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "tracestate": "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE",
}
EVERY = pytest.mark.parametrize("case", MOST, ids=IDS)


def ids(*engines: Simulator) -> list[str]:
    """The ids with which legs came, of requests that were given to engines."""
    return [str(request.headers.get("x-request-id")) for engine in engines for request in engine.requests]


def lines(caplog: pytest.LogCaptureFixture, logger: str) -> list[dict[str, Any]]:
    """The JSON members of a logger's lines."""
    return [record.members for record in caplog.records if record.name == logger]  # type: ignore[attr-defined]


@EVERY
async def test_a_clients_id_is_the_beginning_of_its_legs_and_the_line_has_them(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    async with fleet(case, access_log=True) as (running, [p], [d]):
        caplog.set_level(logging.INFO, "pd_proxy.request")
        p.requests.clear()
        answer = await running.http.post(
            COMPLETIONS, json=completion(), headers={"x-request-id": "order-7.A:b", **TRACE}
        )
        assert answer.status_code == 200
        assert answer.headers["x-request-id"] == "order-7.A:b"
        [line] = lines(caplog, "pd_proxy.request")
        assert {*ids(p), *ids(d)} == {line["leg"]}
        if CONNECTORS[case.name].traits.own_request_ids:
            assert "order-7" not in line["leg"]
        else:
            assert re.fullmatch(r"order-7\.A:b-[0-9a-f]{16}", line["leg"])
            assert line["leg"] in answer.json()["id"]
        assert (line["id"], line["trace_id"]) == ("order-7.A:b", "4bf92f3577b34da6a3ce929d0e0e4736")
        for engine in (p, d):
            for request in engine.requests:
                assert {name: request.headers.get(name) for name in TRACE} == TRACE


async def test_requests_that_share_an_id_do_not_share_legs() -> None:
    async with pools(2, 2) as (running, p, d):
        body = completion(max_tokens=5)
        headers = {"x-request-id": "the-same"}
        await asyncio.gather(*(running.http.post(COMPLETIONS, json=body, headers=headers) for _ in range(8)))
        assert sorted(ids(*p)) == sorted(ids(*d))
        assert len(set(ids(*p))) == 8
        assert all(name.startswith("the-same-") for name in ids(*p))


async def test_each_try_has_an_id_of_its_own_and_lines_of_failures_have_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pd_proxy")
    async with pools(1, 2, access_log=True) as (running, [p], d):
        for engine in d:
            engine.faults.add("status", status=500, leg="decode", count=1)
        answer = await running.http.post(CHAT, json=chat(), headers={"x-request-id": "again"})
        assert answer.status_code == 200
        tried = ids(p)
        assert len(tried) == len(set(tried)) > 1
        failures = lines(caplog, "pd_proxy.flow")
        [line] = lines(caplog, "pd_proxy.request")
        legs = {*tried, *ids(*d)}
        assert tried[0] in {failure["leg"] for failure in failures} <= legs - {line["leg"]}
        assert {failure["id"] for failure in failures} == {"again"}
        assert line["leg"] in legs
        assert (line["tries"], line["retries"]) == (len(legs), len(legs) - 1)


@pytest.mark.parametrize("name", ["a b", "", "x" * 129, "a/b", 'a"b', "caf\xe9", "a\x01"])
async def test_an_id_that_is_not_sane_is_replaced(name: str) -> None:
    async with pools() as (running, [p], [d]):
        headers = {"x-request-id": name.encode("latin-1")}
        try:
            answer = await running.http.post(CHAT, json=chat(), headers=headers)
        except Exception:  # the client library sends no such header
            return
        if answer.status_code == 400:
            return  # no header may have that character
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
        assert {*ids(p), *ids(d)} == {ids(p)[0]}
        assert re.fullmatch("[0-9a-f]{32}-[0-9a-f]{16}", ids(p)[0])


def test_no_id_of_a_clients_names_addresses_to_an_engine() -> None:
    name = "___prefill_addr_10.0.0.1:99___decode_addr_10.0.0.2:99_" + "0" * 32
    assert "__" not in leg_id(name)
    assert len(leg_id("x" * 128)) == 64 + 17
    assert leg_id("req_7").startswith("req_7-")
    assert not re.search("-[0-9a-f]{8}$", leg_id("x")), (
        "vLLM takes such an end for its own, and pairs by what is before it"
    )
    assert re.fullmatch("[0-9a-f]{32}", leg_id(""))


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses", "/v1/messages"])
async def test_other_routes_can_be_followed_as_well(path: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pd_proxy.request")
    bodies: dict[str, Any] = {
        "/v1/embeddings": {"input": PROMPT},
        "/v1/responses": {"input": PROMPT, "max_output_tokens": 3},
        "/v1/messages": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3},
    }
    engine = {"task": "embed"} if path == "/v1/embeddings" else {}
    async with pools(engine=engine, access_log=True) as (running, [p], [d]):
        headers = {"x-request-id": "order-8", **TRACE}
        answer = await running.http.post(path, json={"model": "sim", **bodies[path]}, headers=headers)
        assert (answer.status_code, answer.headers["x-request-id"]) == (200, "order-8"), answer.text
        [line] = lines(caplog, "pd_proxy.request")
        assert line["leg"].startswith("order-8-")
        received = [*p.requests, *d.requests]
        assert received
        for request in received:
            assert request.headers["x-request-id"] == line["leg"]
            assert request.headers["traceparent"] == TRACE["traceparent"]
            if path == "/v1/responses":
                assert request.body["request_id"] == line["answer"] == answer.json()["id"]


async def test_a_trace_that_is_not_valid_reaches_no_engine() -> None:
    async with pools() as (running, [p], [d]):
        for headers in ({**TRACE, "traceparent": "00-1-2-3"}, {"tracestate": "a=1"}):
            await running.http.post(CHAT, json=chat(), headers=headers)
        for request in (*p.requests, *d.requests):
            assert "traceparent" not in request.headers and "tracestate" not in request.headers
