"""The routes of models that do not generate, and operators' commands."""

from __future__ import annotations

import base64
import struct

import httpx
import pytest

from .helpers import Client, Start, chat, greedy

TASKS = {
    "generate": "/v1/chat/completions",
    "embed": "/v1/embeddings",
    "classify": "/classify",
    "transcribe": "/v1/audio/transcriptions",
    "moderate": "/v1/moderations",
}


@pytest.mark.parametrize("task", TASKS)
async def test_routes_of_other_tasks_do_not_exist(start: Start, client: Client, task: str) -> None:
    sim = await start(task=task)
    for other, path in TASKS.items():
        answer = await client.post(sim, path, {})
        assert (answer.status_code == 404) == (other != task), path
        if other != task:
            assert answer.json()["error"]["message"] == "Not Found"
    assert (await client.post(sim, "/tokenize", {"prompt": "the"})).status_code == 200
    assert (await client.get(sim, TASKS[task])).status_code == 405


async def test_engines_of_one_model_agree_and_engines_of_two_models_do_not(start: Start, client: Client) -> None:
    body = {"input": ["the river", [300, 301]]}
    one, same, other = await start(task="any"), await start(task="any"), await start(task="any", weights=1)
    vectors = [(await client.post(sim, "/v1/embeddings", body)).json()["data"] for sim in (one, same, other)]
    assert vectors[0] == vectors[1] != vectors[2]
    assert sum(value * value for value in vectors[0][0]["embedding"]) == pytest.approx(1)
    encoded = (await client.post(one, "/v1/embeddings", body | {"encoding_format": "base64"})).json()["data"]
    unpacked = struct.unpack("<8f", base64.b64decode(encoded[0]["embedding"]))
    assert unpacked == pytest.approx(vectors[0][0]["embedding"], abs=1e-6)


async def test_a_document_is_most_like_itself(start: Start, client: Client) -> None:
    sim = await start(task="embed")
    ranked = await client.post(sim, "/v1/rerank", {"query": "a", "documents": ["b", "a", "c"], "top_n": 2})
    results = ranked.json()["results"]
    assert [results[0]["index"], len(results)] == [1, 2] and results[0]["relevance_score"] == pytest.approx(1)
    scored = await client.post(sim, "/score", {"text_1": "a", "text_2": ["a", "b"]})
    assert scored.json()["data"][0]["score"] == pytest.approx(1)
    assert (await client.post(sim, "/score", {"text_1": ["a", "b"], "text_2": ["a"]})).status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {}),
        ("/v1/embeddings", {"input": "a", "encoding_format": "x"}),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}),
        ("/rerank", {"query": "a"}),
        ("/score", {"text_1": 1, "text_2": "a"}),
        ("/classify", {"input": []}),
        ("/v1/moderations", {"model": 1, "input": "a"}),
        ("/v1/messages/count_tokens", {"messages": "x"}),
    ],
)
async def test_missing_and_wrong_fields_are_refused(start: Start, client: Client, path: str, body: object) -> None:
    sim = await start(task="any")
    assert (await client.post(sim, path, body)).status_code == 400


async def test_a_form_is_transcribed(start: Start, client: Client) -> None:
    sim = await start(task="transcribe")
    url = sim.url + TASKS["transcribe"]
    said = [(await client.http.post(url, files={"file": audio})).json()["text"] for audio in (b"a", b"a", b"b")]
    assert said[0] == said[1] != said[2]
    assert (await client.http.post(url, data={"model": "sim"}, files={"other": b"a"})).status_code == 400
    assert (await client.http.post(url, data={"model": "x"}, files={"file": b"a"})).status_code == 404
    streamed = await client.http.post(url, data={"stream": "true"}, files={"file": b"a"})
    assert streamed.text.endswith("data: [DONE]\n\n") and streamed.headers["content-type"].startswith(
        "text/event-stream"
    )


async def test_the_tokens_of_a_conversation_are_counted_as_they_are_rendered(start: Start, client: Client) -> None:
    sim = await start()
    messages = [{"role": "user", "content": "the river"}]
    counted = await client.post(sim, "/v1/messages/count_tokens", {"messages": messages})
    assert counted.json() == {
        "input_tokens": (await client.post(sim, "/tokenize", {"messages": messages})).json()["count"]
    }
    more = await client.post(sim, "/v1/messages/count_tokens", {"system": "a stone", "messages": messages})
    assert more.json()["input_tokens"] > counted.json()["input_tokens"]


async def test_a_sleeping_engine_reports_healthy_and_lets_requests_wait(start: Start, client: Client) -> None:
    sim = await start()
    assert (await client.get(sim, "/is_sleeping")).json() == {"is_sleeping": False}
    assert (await client.post(sim, "/sleep?level=1", None)).status_code == 200
    assert (await client.get(sim, "/is_sleeping")).json() == {"is_sleeping": True}
    assert (await client.get(sim, "/health")).status_code == 200
    with pytest.raises(httpx.ReadTimeout):
        await client.http.post(sim.url + "/v1/completions", json=greedy(), timeout=0.1)
    await client.post(sim, "/wake_up", None)
    assert (await client.post(sim, "/v1/completions", greedy())).status_code == 200
    assert sim.operations[1] == ("/sleep", "level=1")


async def test_operators_routes_exist_when_they_are_switched_on(start: Start, client: Client) -> None:
    sim = await start(dev_mode=False, profiler=False)
    for path in ("/sleep", "/wake_up", "/reset_prefix_cache", "/start_profile", "/stop_profile"):
        assert (await client.post(sim, path, None)).status_code == 404
    assert (await client.get(sim, "/is_sleeping")).status_code == 404


async def test_other_servers_have_other_paths(start: Start, client: Client) -> None:
    nim, plain = await start(surface="nim"), await start(surface="openai")
    for path in ("/v1/health/live", "/v1/health/ready", "/v1/metrics", "/v1/version", "/v1/models"):
        assert (await client.get(nim, path)).status_code == 200
    assert (await client.get(nim, "/health")).status_code == 404
    assert (await client.get(plain, "/v1/models")).status_code == 200
    for path in ("/health", "/version", "/metrics", "/v1/health/ready", "/is_sleeping"):
        assert (await client.get(plain, path)).status_code == 404
    assert (await client.post(plain, "/v1/chat/completions", chat("hello"))).status_code == 200
