"""Models by name and by alias, and adapters that are loaded and unloaded while the gateway runs."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from pd_proxy_simulator import Simulator

from tests.support import PROMPT, Running, chat, completion, pools, running_gateway, simulators, text_of, until

LORA = "tuned"
PATIENT = {"interval": 30.0}
"""Probes so rare that no test learns anything from one."""


@asynccontextmanager
async def client_of(running: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{running.url}/v1",
        api_key="x",
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(verify=False),
    ) as client:
        yield client


async def load(*engines: Simulator, name: str = LORA) -> None:
    """Load an adapter into engines, as an operator does."""
    async with httpx.AsyncClient(trust_env=False, verify=False) as http:
        for engine in engines:
            body = {"lora_name": name, "lora_path": f"/adapters/{name}"}
            (await http.post(f"{engine.url}/v1/load_lora_adapter", json=body)).raise_for_status()


async def unload(*engines: Simulator, name: str = LORA) -> None:
    async with httpx.AsyncClient(trust_env=False, verify=False) as http:
        for engine in engines:
            (await http.post(f"{engine.url}/v1/unload_lora_adapter", json={"lora_name": name})).raise_for_status()


def said(answer: Any) -> str:
    return str(answer.choices[0].message.content)


async def test_a_request_for_an_alias_is_served_by_its_model() -> None:
    async with pools(aliases={"gpt-4": "sim"}) as (running, [p], [d]), client_of(running) as client:
        messages: Any = [{"role": "user", "content": PROMPT}]
        plain = await client.chat.completions.create(model="sim", messages=messages, max_tokens=12, temperature=0)
        answer = await client.chat.completions.create(model="gpt-4", messages=messages, max_tokens=12, temperature=0)
        assert said(answer) == said(plain)
        assert answer.model == "sim", "as OpenAI's answers, it names the model behind the alias"
        events = await client.chat.completions.create(model="gpt-4", messages=messages, max_tokens=12, stream=True)
        assert {event.model async for event in events} == {"sim"}
        assert [request.body["model"] for engine in (p, d) for request in engine.requests] == ["sim"] * 6
        metrics = await running.metrics()
        assert not any("gpt-4" in name for name in metrics), "one model has one series, whatever it is called"


async def test_an_alias_is_listed_with_its_model() -> None:
    aliases = {"gpt-4": "sim", "o3": LORA, "gone": "no-such-model"}
    engine = {"adapters": (LORA,), "root": "/models/sim"}
    async with pools(aliases=aliases, engine=engine) as (running, _, _), client_of(running) as client:
        cards = {card.id: card.model_dump() for card in (await client.models.list()).data}
        assert set(cards) == {"sim", LORA, "gpt-4", "o3"}
        assert (cards["gpt-4"]["root"], cards["gpt-4"]["parent"]) == ("/models/sim", "sim")
        assert (cards["o3"]["root"], cards["o3"]["parent"]) == (f"/adapters/{LORA}", LORA)
        assert cards["gpt-4"]["max_model_len"] == cards["sim"]["max_model_len"]
        assert (await client.models.retrieve("gpt-4")).model_dump() == cards["gpt-4"]
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gone")
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="gone", prompt="x")


async def test_an_alias_takes_precedence_over_a_model_of_the_same_name() -> None:
    async with pools(aliases={"sim": LORA}, engine={"adapters": (LORA,)}) as (running, _, [d]):
        assert (await running.http.post("/v1/completions", json=completion())).status_code == 200
        assert d.requests[-1].body["model"] == LORA
        cards = (await running.http.get("/v1/models")).json()["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [("sim", LORA), (LORA, "sim")]


async def test_a_request_without_a_model_gets_the_default_one() -> None:
    body = {"prompt": PROMPT, "max_tokens": 4}
    settings = {"aliases": {"usual": LORA}, "default_model": "usual"}
    async with pools(**settings, engine={"adapters": (LORA,)}) as (running, [p], [d]):
        assert (await running.http.post("/v1/completions", json=body)).json()["model"] == LORA
        assert (await running.http.post("/v1/completions", json={**body, "model": None})).json()["model"] == LORA
        assert [request.body["model"] for engine in (p, d) for request in engine.requests] == [LORA] * 4


async def test_without_a_default_a_request_has_to_name_one_of_several_models() -> None:
    body = {"prompt": PROMPT, "max_tokens": 4}
    async with simulators("mixed", model="alpha") as [a], simulators("mixed", model="beta") as [b]:
        async with running_gateway(mixed=[a.url]) as running:
            assert (await running.http.post("/v1/completions", json=body)).status_code == 200
        async with running_gateway(mixed=[a.url, b.url]) as running:
            answer = await running.http.post("/v1/completions", json=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "model"


async def test_an_unknown_model_may_be_served_by_the_default_one() -> None:
    async with pools(default_model="sim", unknown_model="default") as (running, _, [d]):
        answer = await running.http.post("/v1/completions", json=completion(model="gpt-oss"))
        assert answer.json()["model"] == "sim"
        assert d.requests[-1].body["model"] == "sim"


async def test_an_adapter_is_served_as_soon_as_engines_have_it() -> None:
    async with pools(health=PATIENT) as (running, [p], [d]), client_of(running) as client:
        plain = await client.completions.create(model="sim", prompt=PROMPT, max_tokens=8, temperature=0)
        with pytest.raises(openai.NotFoundError) as refused:
            await client.completions.create(model=LORA, prompt=PROMPT)
        assert refused.value.code is None or refused.value.param == "model"
        await load(p, d)
        tuned = await client.completions.with_raw_response.create(
            model=LORA, prompt=PROMPT, max_tokens=8, temperature=0
        )
        assert "x-pd-proxy-fallback" not in tuned.headers
        assert tuned.parse().choices[0].text != plain.choices[0].text
        assert d.engine.stats.pulls == 2
        assert LORA in {card.id for card in (await client.models.list()).data}


async def test_asking_for_the_card_of_an_unknown_model_asks_the_engines() -> None:
    async with pools(health=PATIENT) as (running, [p], [d]), client_of(running) as client:
        await load(p, d)
        card = (await client.models.retrieve(LORA)).model_dump()
        assert (card["root"], card["parent"]) == (f"/adapters/{LORA}", "sim")


async def test_an_adapter_that_only_decode_has_is_prefilled_there() -> None:
    async with pools(health=PATIENT) as (running, [p], [d]):
        await load(d)
        answer = await running.http.post("/v1/completions", json=completion(model=LORA))
        assert answer.status_code == 200
        assert answer.headers["x-pd-proxy-fallback"] == "no_prefill_backend"
        assert not p.requests


async def test_a_request_for_an_adapter_that_only_prefill_has_may_be_repeated_later() -> None:
    async with pools(health=PATIENT) as (running, [p], [d]):
        await load(p)
        answer = await running.http.post("/v1/completions", json=completion(model=LORA))
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        await load(d)
        assert (await running.http.post("/v1/completions", json=completion(model=LORA))).status_code == 200


async def test_adapters_of_one_name_and_two_paths_are_not_paired() -> None:
    async with pools() as (running, [p], [d]), httpx.AsyncClient(trust_env=False, verify=False) as http:
        for engine, path in ((p, "/adapters/1"), (d, "/adapters/2")):
            body = {"lora_name": LORA, "lora_path": path}
            (await http.post(f"{engine.url}/v1/load_lora_adapter", json=body)).raise_for_status()
        answer = await running.http.post("/v1/completions", json=completion(model=LORA))
        assert answer.headers["x-pd-proxy-fallback"] == "no_matching_pair"
        plain = await running.http.post("/v1/completions", json=completion())
        assert "x-pd-proxy-fallback" not in plain.headers, "the model below is the same"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_adapter_that_one_engine_has_lost_is_served_by_another(stream: bool) -> None:
    policy = {"prefill": "round_robin", "decode": "round_robin"}
    engine = {"adapters": (LORA,)}
    async with pools(2, 2, health=PATIENT, policy=policy, engine=engine) as (running, prefill, decode):
        expected = text_of((await running.http.post("/v1/completions", json=completion(model=LORA))).json())
        await unload(prefill[0], decode[0])
        for _ in range(4):
            answer = await running.http.post("/v1/completions", json=completion(model=LORA, stream=stream))
            assert answer.status_code == 200, answer.text
            if not stream:
                assert text_of(answer.json()) == expected
        refused = [sum(request.status == 404 for request in one.requests) for one in (prefill[0], decode[0])]
        assert max(refused) <= 1, "it is asked once, and not again"
        await until(running.idle)


async def test_an_adapter_that_no_engine_has_any_more_is_the_engines_404() -> None:
    async with pools(engine={"adapters": (LORA,)}, health=PATIENT) as (running, [p], [d]):
        await unload(p, d)
        answer = await running.http.post("/v1/chat/completions", json=chat(model=LORA))
        assert answer.status_code == 404
        assert answer.json()["error"]["param"] == "model"
        await until(lambda: not running.gateway.fleet.names(LORA))
        again = await running.http.post("/v1/chat/completions", json=chat(model=LORA))
        assert again.json()["error"]["code"] == "model_not_found"


async def test_requests_for_unknown_models_rarely_cause_questions_to_engines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pd_proxy.fleet.health.prober._MOST_ASKED", 4)  # with two engines: one round each half second
    async with pools(health=PATIENT) as (running, _, [d]):
        asked: list[float] = []
        models = running.gateway.fleet.pool("decode")[0]
        loop = asyncio.get_running_loop()
        learnt = running.gateway.fleet.set_models

        def note(backend: Any, cards: Any, version: str) -> None:
            if backend is models:
                asked.append(loop.time())
            learnt(backend, cards, version)

        running.gateway.fleet.set_models = note  # type: ignore[method-assign]
        for _ in range(2):
            answers = await asyncio.gather(
                *(running.http.post("/v1/completions", json=completion(model=f"none-{n}")) for n in range(20))
            )
            assert {answer.status_code for answer in answers} == {404}
        # One round for all requests that came together. On a busy machine they come in more than two rounds.
        assert len(asked) >= 2
        assert min(later - earlier for earlier, later in itertools.pairwise(asked)) > 0.4
        assert not d.requests


async def test_a_client_that_leaves_while_engines_are_asked_cancels_no_other_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pd_proxy.fleet.health.prober._MOST_ASKED", 2)
    async with pools(health=PATIENT) as (running, [p], [d]):
        await running.http.get("/v1/models/none")  # the next round is a second away
        task = asyncio.create_task(running.http.post("/v1/completions", json=completion(model="none")))
        other = asyncio.create_task(running.http.post("/v1/completions", json=completion(model=LORA)))
        await until(lambda: running.gateway.gate.inside == 2)
        task.cancel()
        await load(p, d)
        assert (await other).status_code == 200
        await until(running.idle)
