"""A gateway whose backends lead back to itself refuses looping requests; a gateway behind a gateway works."""

from __future__ import annotations

import pytest
from pd_proxy.errors import LoopDetected
from pd_proxy.flow.hops import MOST, Hops

from tests.support import chat, running_gateway, simulators, text_of, until

CHAT = "/v1/chat/completions"
HEADER = "x-pd-proxy-hops"


def passed(*gateways: Hops) -> bytes:
    """What a request says that has come through some gateways."""
    said = b""
    for gateway in gateways:
        line = gateway.onward(gateway.passed(said))
        assert line.endswith(b"\r\n") and line.count(b"\r\n") == 1
        said = line.partition(b": ")[2].strip()
    return said


def test_a_request_is_refused_where_it_has_been() -> None:
    gateways = [Hops() for _ in range(3)]
    said = passed(*gateways)
    for gateway in gateways:
        with pytest.raises(LoopDetected):
            gateway.passed(said)
    Hops().passed(said)


def test_a_request_comes_through_a_bounded_number_of_gateways() -> None:
    said = passed(*[Hops() for _ in range(MOST)])
    with pytest.raises(LoopDetected):
        Hops().passed(said)


@pytest.mark.parametrize("said", [b"", b"x" * 1000, b"\x00\xff", b"a\r\nx-evil: 1", b"0123456789abcdef0"])
def test_what_a_client_writes_there_reaches_no_engine(said: bytes) -> None:
    gateway = Hops()
    assert gateway.onward(gateway.passed(said)) == gateway.line


def test_workers_of_one_gateway_are_one() -> None:
    with pytest.raises(LoopDetected):
        Hops("/tmp/pd-proxy-1").passed(passed(Hops("/tmp/pd-proxy-1")))
    Hops("/tmp/pd-proxy-2").passed(passed(Hops("/tmp/pd-proxy-1")))


async def test_a_gateway_that_is_its_own_backend_is_not_up_and_reports_why() -> None:
    async with simulators("mixed") as [engine], running_gateway(mixed=[engine.url]) as running:
        itself = running.gateway.fleet.add(running.url, "mixed")
        await until(lambda: "this gateway itself" in itself.reason)
        for _ in range(4):
            assert (await running.http.post(CHAT, json=chat())).status_code == 200
        assert not itself.up


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.slow
async def test_two_gateways_that_are_each_others_backends_end_a_request_with_an_error(path: str) -> None:
    async with (
        running_gateway(ready=False) as one,
        running_gateway(mixed=[one.url], ready=False) as other,
    ):
        back = one.gateway.fleet.add(other.url, "mixed")
        await until(lambda: back.up and all(backend.up for backend in other.gateway.fleet))
        answer = await one.http.post(path, json={**chat(), "prompt": "x"} if path == "/tokenize" else chat())
        assert answer.status_code == 508
        assert answer.json()["error"]["code"] == "loop_detected"
        await until(lambda: one.idle() and other.idle())


async def test_a_gateway_behind_a_gateway_serves() -> None:
    async with (
        simulators("mixed") as [engine],
        running_gateway(mixed=[engine.url]) as inner,
        running_gateway(mixed=[inner.url]) as outer,
    ):
        expected = text_of((await inner.http.post(CHAT, json=chat())).json())
        assert text_of((await outer.http.post(CHAT, json=chat())).json()) == expected
        [direct, through] = [request.headers[HEADER] for request in engine.requests if request.path == CHAT]
        assert through.endswith(f", {direct}") and len(through.split(", ")) == 2
        answer = await outer.http.post(CHAT, json=chat(stream=True))
        assert answer.text.endswith("data: [DONE]\n\n")
