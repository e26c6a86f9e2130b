"""What the simulator's tests share: a plain HTTP client, and the two legs sent by hand."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
from pd_proxy_simulator import Simulator

from tests.support import simulators

PROMPT = "the river runs past the old harbour and the engine waits for a signal " * 4
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


class Client:
    """Talks to simulators."""

    def __init__(self) -> None:
        self.http = httpx.AsyncClient(timeout=60, verify=False)

    async def post(self, sim: Simulator, path: str, body: Any, **headers: str) -> httpx.Response:
        return await self.http.post(sim.url + path, json=body, headers=headers)

    async def get(self, sim: Simulator, path: str) -> httpx.Response:
        return await self.http.get(sim.url + path)

    async def text(self, sim: Simulator, **body: Any) -> str:
        answer = await self.post(sim, "/v1/completions", greedy(**body))
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    async def prefill(self, sim: Simulator, **body: Any) -> dict[str, Any]:
        leg = greedy(**body) | {"max_tokens": 1, "min_tokens": 1, "kv_transfer_params": PREFILL}
        answer = await self.post(sim, "/v1/completions", leg)
        assert answer.status_code == 200, answer.text
        return answer.json()["kv_transfer_params"]

    async def complete(
        self, sim: Simulator, *, params: Any = None, tokens: int = 1, request_id: str | None = None, **more: Any
    ) -> httpx.Response:
        """A completion with a connector's `kv_transfer_params`, or a request id that holds them."""
        body = {"model": "sim", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, **more}
        if params is not None:
            body["kv_transfer_params"] = params
        headers = {} if request_id is None else {"x-request-id": request_id}
        return await self.post(sim, "/v1/completions", body, **headers)

    async def events(self, sim: Simulator, path: str, body: Any) -> AsyncIterator[Any]:
        """The data of each server-sent event; "[DONE]" as text."""
        async with self.http.stream("POST", sim.url + path, json=body | {"stream": True}) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    data = line.removeprefix("data: ")
                    yield data if data == "[DONE]" else json.loads(data)

    async def all_events(self, sim: Simulator, path: str, body: Any) -> list[Any]:
        return [event async for event in self.events(sim, path, body)]


async def text_of_one(client: Client, **body: Any) -> str:
    """The text of one engine without a connector."""
    async with simulators("mixed") as [single]:
        return await client.text(single, **body)


Start = Callable[..., Awaitable[Simulator]]
"""Starts a simulator with the given options (the fixture `start`)."""


async def start_pair(start: Start, connector: str, **options: Any) -> tuple[Simulator, Simulator]:
    """A prefill and a decode engine that speak a connector."""
    options = {"connector": connector, **options}
    return await start(role="prefill", **options), await start(role="decode", **options)


def greedy(**body: Any) -> dict[str, Any]:
    return {"model": "sim", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True} | body


def chat(text: str = "tell me of the river", **body: Any) -> dict[str, Any]:
    return {
        "model": "sim",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
    } | body
