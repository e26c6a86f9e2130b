"""The throughput between two looks."""

from __future__ import annotations

import logging

import pytest
from pd_proxy.telemetry.logs import log_throughput
from pd_proxy.telemetry.records import RequestRecord
from pd_proxy.telemetry.throughput import Throughput

from tests.support import completion, pools, until


class Scene:
    """A sink whose clock and count of streamed tokens the test sets."""

    def __init__(self) -> None:
        self.now = 100.0
        self.streamed = 1000
        self.throughput = Throughput(lambda: self.streamed, lambda: self.now)

    def finished(self, *, ttft: float | None = 0.5, outcome: str = "ok", stream: bool = True, tokens: int = 9) -> None:
        self.throughput.finished(
            RequestRecord(
                "chat",
                stream=stream,
                started=self.now,
                first_token=None if ttft is None else self.now + ttft,
                outcome=outcome,
                prompt_tokens=20,
                tokens=tokens,
            )
        )


def test_a_look_counts_what_was_served_since_the_last_one() -> None:
    scene = Scene()
    for ttft in (0.1, 0.2, 0.3, 0.4):
        scene.finished(ttft=ttft)
    scene.finished(stream=False, ttft=None, tokens=30)
    scene.finished(outcome="no_backend", ttft=None, tokens=0)
    scene.finished(outcome="client_gone", ttft=None, tokens=0)
    scene.streamed += 26
    scene.now += 60
    assert scene.throughput.look(2, 1) == {
        "seconds": 60.0,
        "requests": 7,
        "failed": 1,
        "in_flight": 2,
        "waiting": 1,
        "tokens_per_second": 1.0,  # 26 gaps, 4 first tokens, 30 of the answer that was not streamed
        "prompt_tokens_per_second": 2.3,
        "ttft_p50": 0.3,
        "ttft_p95": 0.4,
    }
    scene.now += 60
    assert scene.throughput.look(0, 0) is None


def test_the_tokens_of_an_open_stream_are_counted_before_it_ends() -> None:
    scene = Scene()
    scene.streamed += 600
    scene.now += 60
    found = scene.throughput.look(1, 0)
    assert found is not None
    assert (found["requests"], found["in_flight"], found["tokens_per_second"]) == (0, 1, 10.0)


def test_a_backend_that_left_causes_no_negative_throughput() -> None:
    scene = Scene()
    scene.finished(ttft=None)
    scene.streamed -= 900
    scene.now += 10
    found = scene.throughput.look(0, 0)
    assert found is not None
    assert found["tokens_per_second"] == 0


def test_an_idle_gateway_logs_no_throughput(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    with caplog.at_level(logging.INFO, "pd_proxy"):
        log_throughput(scene.throughput, 0, 0)
        assert not caplog.records
        scene.finished()
        log_throughput(scene.throughput, 0, 0)
    (record,) = caplog.records
    assert record.message == "throughput"
    assert record.fields["requests"] == 1  # type: ignore[attr-defined]


async def test_a_gateway_logs_its_throughput_while_it_serves(caplog: pytest.LogCaptureFixture) -> None:
    def told() -> list[dict[str, float]]:
        fields = [record.fields for record in caplog.records if record.message == "throughput"]  # type: ignore[attr-defined]
        return [found for found in fields if found["requests"]]

    with caplog.at_level(logging.INFO, "pd_proxy"):
        async with pools(throughput_interval=0.05) as (running, _, _):
            assert (await running.http.post("/v1/completions", json=completion(stream=True))).status_code == 200
            await until(lambda: bool(told()), 30)
    assert told()[0]["failed"] == 0
    assert told()[0]["ttft_p50"] > 0
