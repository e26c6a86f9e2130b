"""One request can be followed: from its client's id to the gateway's log line, to both engines' logs, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from .bed import Bed
from .engines import Engine
from .gateway import Gateway, serving
from .processes import wait_until
from .questions import Api, body_for, prompt_of
from .severing import Severing, severing

pytestmark = pytest.mark.real

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
TRACESTATE = "congo=t61rcWkgMzE"


@pytest.fixture(scope="module")
def wires(bed: Bed) -> Iterator[Severing]:
    """Relays that sever nothing: they show what both engines are sent."""
    with severing(bed.prefill.url, bed.decode.url) as started:
        yield started


@pytest.fixture(scope="module")
def followed(wires: Severing, logs: Path) -> Iterator[Gateway]:
    flags = ("--warmup", "false", "--access-log", "true", "--log-format", "json")
    prefill, decode = wires.urls
    with serving(prefill, decode, logs / "gateway-followed.log", *flags) as started:
        yield started


def ask_as(
    gateway: Gateway, name: str, api: Api, stream: bool, headers: dict[str, str] | None = None
) -> httpx.Response:
    body = {**body_for(api, prompt_of(70, name), max_tokens=8), "stream": stream}
    headers = {"x-request-id": name, **(headers or {})}
    return httpx.post(gateway.url + api.value, json=body, headers=headers, timeout=60).raise_for_status()


def line_of(gateway: Gateway, name: str) -> dict[str, Any]:
    """The gateway's log line about a request."""

    def lines() -> list[dict[str, Any]]:
        written = [json.loads(line) for line in gateway.group.logged().splitlines() if line.startswith("{")]
        return [line for line in written if line.get("id") == name and "outcome" in line]

    wait_until(lambda: bool(lines()), 10, f"the gateway's line about {name}")
    (line,) = lines()
    return line


def received(engine: Engine, since: int, leg: str) -> list[str]:
    """The ids by which an engine's log names a leg where it says that it has received it."""
    said = re.compile(rf"Received request (\S*{re.escape(leg)}\S*): ")
    wait_until(lambda: said.search(engine.group.logged(since)) is not None, 10, f"{leg} in {engine.group.log}")
    return said.findall(engine.group.logged(since))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("api", Api, ids=lambda api: api.name.lower())
def test_a_clients_id_leads_to_both_engines_logs_and_back(bed: Bed, followed: Gateway, api: Api, stream: bool) -> None:
    name = f"order:7.{api.name.lower()}_{stream}"
    since = {engine.url: len(engine.group.log.read_bytes()) for engine in (bed.prefill, bed.decode)}
    answer = ask_as(followed, name, api, stream)
    assert answer.headers["x-request-id"] == name
    line = line_of(followed, name)
    assert line["outcome"] == "ok"
    leg = line["leg"]
    assert re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{16}}", leg)
    prefix = "chatcmpl" if api is Api.CHAT else "cmpl"
    for engine in (bed.prefill, bed.decode):
        (said,) = set(received(engine, since[engine.url], leg))
        assert said.startswith(f"{prefix}-{leg}")
        # From an engine's line back to the client's id, as in docs/logs.md: all but the last 17 characters of the leg's
        # id.
        found = re.search(rf"{prefix}-(\S+-[0-9a-f]{{16}})", said)
        assert found and found[1][:-17] == name
    assert f'"id":"{prefix}-{leg}' in answer.text


def test_each_of_two_requests_with_one_id_has_legs_of_its_own(followed: Gateway) -> None:
    answers = [ask_as(followed, "twice", Api.CHAT, False) for _ in range(2)]
    assert [answer.headers["x-request-id"] for answer in answers] == ["twice", "twice"]
    first, second = (answer.json()["id"] for answer in answers)
    assert first != second and all(name.startswith("chatcmpl-twice-") for name in (first, second))


def test_a_refused_request_can_be_followed_as_well(bed: Bed, followed: Gateway) -> None:
    body = {**body_for(Api.CHAT, prompt_of(70, "refused")), "max_tokens": 100_000}
    headers = {"x-request-id": "refused-1"}
    answer = httpx.post(followed.url + Api.CHAT.value, json=body, headers=headers, timeout=60)
    assert (answer.status_code, answer.headers["x-request-id"]) == (400, "refused-1")
    assert line_of(followed, "refused-1")["status"] == 400


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_trace_is_passed_on_to_both_engines(wires: Severing, followed: Gateway, stream: bool) -> None:
    wires.plan()
    name = f"traced-{stream}"
    ask_as(followed, name, Api.CHAT, stream, {"traceparent": TRACEPARENT, "tracestate": TRACESTATE})
    assert [leg.engine for leg in wires.legs] == list(wires.upstreams)
    for leg in wires.legs:
        head = bytes(leg.request).partition(b"\r\n\r\n")[0].decode().lower().split("\r\n")
        assert f"traceparent: {TRACEPARENT}" in head
        assert f"tracestate: {TRACESTATE.lower()}" in head
    assert line_of(followed, name)["trace_id"] == TRACE


def test_an_invalid_trace_is_sent_to_no_engine(wires: Severing, followed: Gateway) -> None:
    wires.plan()
    ask_as(followed, "untraced", Api.CHAT, False, {"traceparent": f"00-{'0' * 32}-00f067aa0ba902b7-01"})
    assert len(wires.legs) == 2
    assert not [leg for leg in wires.legs if b"traceparent" in bytes(leg.request).lower()]
    assert "trace_id" not in line_of(followed, "untraced")
