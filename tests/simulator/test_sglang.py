"""What simulated SGLang engines do with legs that are missing, doubled or incomplete."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from pd_proxy_simulator import Simulator

from .helpers import Client, Start, greedy, start_pair

ROOM = 5_000_000_000


def with_rendezvous(prefill: Simulator, room: Any = ROOM, **body: Any) -> dict[str, Any]:
    return greedy(**body) | {
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": prefill.side_port,
        "bootstrap_room": room,
    }


async def both(client: Client, p: Simulator, d: Simulator, body: dict[str, Any], **decode: Any) -> list[httpx.Response]:
    path = "/v1/completions"
    return list(await asyncio.gather(client.post(p, path, body), client.post(d, path, {**body, **decode})))


async def test_decode_answers_whichever_leg_comes_first(start: Start, client: Client) -> None:
    p, d = await start_pair(start, "sglang")
    expected = await client.text(await start(role="mixed", connector="sglang"))
    given, answer = await both(client, p, d, with_rendezvous(p))
    assert answer.json()["choices"][0]["text"] == expected
    choice = given.json()["choices"][0]
    assert choice["finish_reason"] == "length" and expected.startswith(choice["text"])
    assert given.json()["usage"]["completion_tokens"] == 1, "prefill makes one token, whatever it is asked"
    body = with_rendezvous(p, ROOM + 99, prompt="another " * 30)
    later = asyncio.create_task(client.post(d, "/v1/completions", body))
    await d.wait_for(lambda: d.engine.loading == 1)
    assert (await client.post(p, "/v1/completions", body)).status_code == 200
    assert (await later).status_code == 200
    assert d.engine.pulls == 2 and p.engine.used_blocks == 0


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_request_without_a_room_is_refused(start: Start, client: Client, role: str) -> None:
    engine = await start(role=role, connector="sglang")
    answer = await client.post(engine, "/v1/completions", greedy())
    assert answer.status_code == 400
    error = answer.json()
    assert (error["object"], error["code"]) == ("error", 400)
    assert "without bootstrap room" in error["message"]


@pytest.mark.parametrize("room", ["7", 1.5, True, -1, 1 << 63, [1, "2"]])
async def test_a_room_of_another_type_is_refused(start: Start, client: Client, room: object) -> None:
    p, _ = await start_pair(start, "sglang")
    assert (await client.post(p, "/v1/completions", with_rendezvous(p, room))).status_code == 400


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_leg_without_its_peer_waits_and_fails_when_its_lease_ends(
    start: Start, client: Client, role: str
) -> None:
    p, d = await start_pair(start, "sglang", lease=0.2)
    engine = p if role == "prefill" else d
    asked = asyncio.create_task(client.post(engine, "/v1/completions", with_rendezvous(p)))
    await engine.wait_for(lambda: engine.engine.loading == 1)
    answer = await asked
    assert (answer.status_code, answer.json()["object"]) == (500, "error")
    assert engine.engine.stats.prompt_tokens == 0, "it has computed the prompt"
    await engine.wait_for(lambda: engine.engine.used_blocks == 0)


async def test_awaiting_prefill_before_decode_is_sent_is_a_deadlock(start: Start, client: Client) -> None:
    p, d = await start_pair(start, "sglang", lease=0.2)
    assert (await client.post(p, "/v1/completions", with_rendezvous(p))).status_code == 500
    assert (await client.post(d, "/v1/completions", with_rendezvous(p))).status_code == 500


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_two_live_requests_in_one_room_kill_the_scheduler(start: Start, client: Client, role: str) -> None:
    p, d = await start_pair(start, "sglang")
    engine = p if role == "prefill" else d
    first = asyncio.create_task(client.post(engine, "/v1/completions", with_rendezvous(p)))
    await engine.wait_for(lambda: engine.engine.loading == 1)
    second = await client.post(engine, "/v1/completions", with_rendezvous(p))
    assert second.status_code == (await first).status_code == 500
    assert engine.engine.dead is not None


async def test_a_room_may_be_used_again_once_it_is_free(start: Start, client: Client) -> None:
    p, d = await start_pair(start, "sglang")
    for prompt in ("one " * 20, "two " * 20):
        assert [a.status_code for a in await both(client, p, d, with_rendezvous(p, prompt=prompt))] == [200, 200]


@pytest.mark.parametrize("rooms", [ROOM, [ROOM + 8, ROOM + 3, ROOM]])
async def test_each_prompt_of_a_list_has_a_room(start: Start, client: Client, rooms: object) -> None:
    p, d = await start_pair(start, "sglang")
    mixed = await start(role="mixed", connector="sglang")
    prompts = ["the first " * 9, "the second " * 9, "the third " * 9]
    _, answer = await both(client, p, d, with_rendezvous(p, rooms, prompt=prompts))
    assert [c["text"] for c in answer.json()["choices"]] == [await client.text(mixed, prompt=one) for one in prompts]
    assert d.engine.pulls == 3


async def test_several_choices_share_one_room_and_kill_the_engines(start: Start, client: Client) -> None:
    p, d = await start_pair(start, "sglang")
    await both(client, p, d, with_rendezvous(p, n=2, temperature=1))
    assert p.engine.dead is not None


async def test_the_first_token_is_the_one_that_prefill_drew(start: Start, client: Client) -> None:
    p, d = await start_pair(start, "sglang")
    same, other = {}, {}
    for room, (found, decode) in enumerate([(same, {}), (other, {"seed": 4})]):
        body = with_rendezvous(p, ROOM + room, temperature=1, seed=3, logprobs=1)
        given, answer = await both(client, p, d, body, **decode)
        found["p"], found["d"] = (a.json()["choices"][0] for a in (given, answer))
    assert other["d"]["text"].startswith(other["p"]["text"]) and same["p"]["text"] == other["p"]["text"]
    assert same["d"]["text"] != other["d"]["text"]


async def test_the_log_probabilities_of_the_first_token_come_from_prefill(start: Start, client: Client) -> None:
    p, d = await start_pair(start, "sglang")
    _, right = await both(client, p, d, with_rendezvous(p, logprobs=1))
    d.engine.pool.forget()
    body = with_rendezvous(p, ROOM + 1)
    _, wrong = await both(client, p, d, body, logprobs=1)
    shown = [a.json()["choices"][0]["logprobs"]["token_logprobs"] for a in (right, wrong)]
    assert shown[0][0] != shown[1][0] and shown[0][1:] == shown[1][1:]


async def test_decode_without_a_host_kills_the_scheduler(start: Start, client: Client) -> None:
    p, d = await start_pair(start, "sglang")
    await client.post(d, "/v1/completions", with_rendezvous(p) | {"bootstrap_host": None})
    assert d.engine.dead is not None


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_waiting_leg_whose_client_disconnects_frees_everything_at_once(
    start: Start, client: Client, role: str
) -> None:
    p, d = await start_pair(start, "sglang")
    engine = p if role == "prefill" else d
    asked = asyncio.create_task(client.post(engine, "/v1/completions", with_rendezvous(p)))
    await engine.wait_for(lambda: engine.engine.loading == 1)
    asked.cancel()
    await engine.wait_for(lambda: engine.engine.used_blocks == 0 and engine.engine.waiting == 0)
    assert engine.engine.aborted == 1


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
async def test_an_engine_reports_its_role_and_its_bootstrap_port(start: Start, client: Client, path: str) -> None:
    p, d = await start_pair(start, "sglang")
    told = (await client.get(p, path)).json()
    assert (told["disaggregation_mode"], told["disaggregation_bootstrap_port"]) == ("prefill", p.side_port)
    assert (await client.get(d, path)).json()["disaggregation_mode"] == "decode"
    assert (await client.http.get(f"http://127.0.0.1:{p.side_port}/health")).status_code == 200
    assert "disaggregation_mode" not in (await client.get(await start(), path)).text, "vLLM tells nothing of it"
