"""The properties of MooncakeConnectorV1: a decode engine without memory ends requests early, and both legs have one
id."""

from __future__ import annotations

import pytest

from tests.contract.answers import PATHS, body, text_of_one, text_of_stream
from tests.contract.cases import CASES, fleet
from tests.support import running_gateway, simulators, text_of, until

pytestmark = pytest.mark.cross_product

ASCEND = next(case for case in CASES if case.name == "mooncake_ascend")
BOTH = pytest.mark.parametrize("endpoint", PATHS)
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@BOTH
@STREAMED
@pytest.mark.parametrize("after", [0, 1, 9])
async def test_a_request_that_decode_aborts_is_finished_nevertheless(endpoint: str, stream: bool, after: int) -> None:
    async with fleet(ASCEND, decode=2) as (running, prefill, decode):
        for engine in decode:  # any of them may be chosen
            engine.faults.add("recomputed", leg="decode", after_tokens=after, count=1)
        answer = await running.http.post(PATHS[endpoint], json=body(endpoint, stream=stream, ignore_eos=True))
        assert answer.status_code == 200, answer.text
        said = text_of_stream(answer.text) if stream else text_of(answer.json())
        assert said == await text_of_one(endpoint, ignore_eos=True)
        assert "recomputed" not in answer.text
        assert sum(len(engine.requests) for engine in decode) == 3
        await until(running.idle)
        for engine in (*prefill, *decode):
            await engine.wait_for(lambda engine=engine: engine.engine.used_blocks == 0)  # type: ignore[misc]


@BOTH
async def test_both_legs_of_a_try_have_one_id_and_each_try_another(endpoint: str) -> None:
    async with fleet(ASCEND) as (running, [p], [d]):
        d.faults.add("status", leg="decode", status=500, count=1)
        answer = await running.http.post(PATHS[endpoint], json=body(endpoint), headers={"x-request-id": "mine"})
        assert answer.status_code == 200
        names = [request.headers["x-request-id"] for request in d.requests]
        assert [request.headers["x-request-id"] for request in p.requests] == names
        assert len(set(names)) == 2
        assert "mine" not in names


async def test_ranks_that_are_separate_servers_are_separate_backends() -> None:
    """External data parallelism: a pool lists each rank."""
    async with simulators("prefill", "prefill", "decode", "decode", connector="mooncake_ascend") as engines:
        p, d = engines[:2], engines[2:]
        urls = [engine.url for engine in p], [engine.url for engine in d]
        async with running_gateway(*urls, connector="mooncake_ascend", policy={"prefill": "round_robin"}) as running:
            for number in range(4):
                text = f"{number} another prompt, so that no cache helps"
                prompt = {"prompt": text}
                answer = await running.http.post(PATHS["completions"], json=body("completions", **prompt))
                assert text_of(answer.json()) == await text_of_one("completions", **prompt)
            assert [len(engine.requests) for engine in p] == [2, 2]
            assert sum(engine.engine.pulls for engine in d) == 4
            assert not any("x-data-parallel-rank" in r.headers for e in engines for r in e.requests)


async def test_an_unread_hand_off_of_a_stored_response_is_prefilled_again_since_its_id_names_the_decode_engine() -> (
    None
):
    async with fleet(ASCEND, decode=2, policy={"decode": "round_robin"}) as (running, [p], decode):
        decode[0].faults.add("status", leg="decode", status=429, count=1)  # busy: it has not read the hand-off
        for _ in range(2):  # one of them gets the fault
            asked = {"model": "sim", "input": "tell me of the river " * 8, "max_output_tokens": 8, "store": True}
            answer = await running.http.post("/v1/responses", json=asked)
            assert answer.status_code == 200, answer.text
        made = {request.body["request_id"] for request in p.requests}
        served = [request.body["request_id"] for engine in decode for request in engine.requests]
        assert len(p.requests) == len(served) == 3
        assert set(served) <= made
