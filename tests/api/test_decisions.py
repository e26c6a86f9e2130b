"""Placement decisions: /admin/decisions, x-pd-proxy-explain, /admin/explain and `pd-proxy explain`."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from pd_proxy import cli

from tests.support import OPERATOR, PROMPT, Running, TestServer, chat, completion, pools, running_gateway, until

CHAT = "/v1/chat/completions"
DECISION = "x-pd-proxy-decision"
KEYS = {"admin_key": "operator", "api_keys": ["client"]}
LONG = PROMPT * 40


async def told(running: Running, **query: Any) -> list[dict[str, Any]]:
    answer = await running.http.get("/admin/decisions", params=query)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["decisions"]
    return found


async def test_a_decision_shows_candidates_costs_reason_and_the_outcome_of_its_request() -> None:
    async with pools(2, 2) as (running, prefills, decodes):
        urls = {engine.url for engine in (*prefills, *decodes)}
        for name in ("first", "second"):
            answer = await running.http.post(CHAT, json=chat(LONG), headers={"x-request-id": name})
            assert answer.status_code == 200
        [first] = await told(running, request_id="first")
        assert first["complete"]  # the gateway is idle
        age = datetime.now(UTC) - datetime.fromisoformat(first["at"])
        assert timedelta(0) <= age < timedelta(minutes=1)
        assert {one["url"] for one in first["candidates"]} == urls
        assert first["candidates_of"] == {"prefill": 2, "decode": 2}
        assert {one["url"] for one in first["candidates"] if one["chosen"]} == {first["prefill"], first["decode"]}
        assert (first["pool"], first["try"], first["error"], first["left_out"]) == ("decode", 1, None, [])
        assert first["outcome"]["outcome"] == "ok"
        [second, _] = (await told(running))[:2]
        assert second["request_id"] == "second"
        assert second["prefill"] == first["prefill"]  # it has cached the prompt
        [chosen] = [one for one in second["candidates"] if one["url"] == second["prefill"]]
        assert chosen["cached"] > 0.5 * second["prompt_tokens"]
        assert second["reason"] == "cached"
        assert len(await told(running, limit=1)) == 1


async def test_excluded_backends_are_shown_with_the_rule_that_excluded_them() -> None:
    async with pools(1, 3) as (running, _, [drained, dead, there]):
        name = drained.url.removeprefix("http://")
        assert (await running.http.post(f"/admin/backends/{name}/drain")).status_code == 200
        dead.faults.add("refuse")
        await until(lambda: not _backend(running, dead.url).up)
        answer = await running.http.post(CHAT, json=chat(), headers={"x-pd-proxy-explain": "1"})
        decision = json.loads(answer.headers[DECISION])
        rules = {one["url"]: one["rule"] for one in decision["left_out"]}
        assert rules == {drained.url: "draining", dead.url: "down"}
        assert decision["decode"] == there.url
        assert decision["left_out_by"] == {"draining": 1, "down": 1}


def _backend(running: Running, url: str) -> Any:
    return next(one for one in running.gateway.fleet if one.url == url)


async def test_a_decision_without_any_candidate_is_shown_too() -> None:
    async with pools(1, 1) as (running, _, [d]):
        d.faults.add("refuse")
        await until(lambda: not _backend(running, d.url).up)
        answer = await running.http.post(CHAT, json=chat(), headers={"x-request-id": "lost"})
        assert answer.status_code == 503
        decision = (await told(running, request_id="lost"))[0]
        assert "no backend that could answer is up" in decision["error"]
        assert {"url": d.url, "role": "decode", "rule": "down"} in decision["left_out"]
        assert decision["outcome"]["status"] == 503


async def test_each_try_is_a_decision() -> None:
    async with pools(1, 2, policy={"decode": "round_robin"}) as (running, _, decodes):
        for engine in decodes:
            engine.faults.add("status", status=500, leg="decode", count=1)
        answer = await running.http.post(CHAT, json=chat(), headers={"x-request-id": "tried"})
        assert answer.status_code == 200
        tries = await told(running, request_id="tried")
        assert [one["try"] for one in tries] == list(range(len(tries), 0, -1))
        assert len(tries) > 1
        assert [one["outcome"] is not None for one in tries] == [True, *[False] * (len(tries) - 1)]
        assert tries[0]["decode"] != tries[1]["decode"]


# x-pd-proxy-explain: a decision with the answer of its request


@pytest.mark.parametrize("stream", [True, False])
async def test_the_admin_key_gets_the_decision_with_the_answer(stream: bool) -> None:
    async with pools(2, 2, **KEYS) as (running, _, _):
        headers = {"authorization": "Bearer operator", "x-api-key": "client", "x-pd-proxy-explain": "1"}
        answer = await running.http.post(CHAT, json=chat(stream=stream), headers=headers)
        assert answer.status_code == 200
        value = answer.headers[DECISION]
        assert value.isascii()
        assert len(value) <= 4096
        decision = json.loads(value)
        record = (await running.http.get("/admin/decisions", headers=OPERATOR)).json()["decisions"][0]
        for name in ("request_id", "prefill", "decode", "reason", "prompt_tokens", "left_out_by"):
            assert decision[name] == record[name], name
        assert len(decision["candidates"]) == 4


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer client", "x-pd-proxy-explain": "1"},
        {"x-api-key": "client", "x-pd-proxy-explain": "1"},
        {"authorization": "Bearer wrong", "x-api-key": "client", "x-pd-proxy-explain": "1"},
        {"authorization": "Bearer operator", "x-api-key": "client", "x-pd-proxy-explain": "0"},
        {"authorization": "Bearer operator", "x-api-key": "client"},
    ],
)
async def test_without_the_admin_key_the_answer_has_no_decision(headers: dict[str, str]) -> None:
    async with pools(1, 1, **KEYS) as (running, [p], [d]):
        answer = await running.http.post(CHAT, json=chat(), headers=headers)
        assert answer.status_code == 200
        assert DECISION not in answer.headers
        said = f"{answer.headers} {answer.text}"
        assert p.url not in said
        assert d.url not in said


async def test_where_no_admin_key_is_set_no_answer_has_a_decision() -> None:
    async with pools(1, 1, admin_key=None) as (running, _, _):
        answer = await running.http.post(CHAT, json=chat(), headers={"x-pd-proxy-explain": "1"})
        assert answer.status_code == 200
        assert DECISION not in answer.headers


async def test_the_admin_key_is_not_a_clients_key() -> None:
    async with pools(1, 1, **KEYS) as (running, _, _):
        headers = {"authorization": "Bearer operator", "x-pd-proxy-explain": "1"}
        assert (await running.http.post(CHAT, json=chat(), headers=headers)).status_code == 401


# /admin/explain: a decision without a request


async def explained(running: Running, body: Any, **query: str) -> dict[str, Any]:
    answer = await running.http.post("/admin/explain", json=body, params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_explaining_a_body_returns_its_decision_and_changes_nothing() -> None:
    async with pools(2, 2) as (running, prefills, decodes):
        engines = [*prefills, *decodes]
        await running.http.post(CHAT, json=chat(LONG))
        before = [len(engine.requests) for engine in engines]
        noted, metrics = await told(running), await running.metrics()
        decision = await explained(running, chat(LONG, max_tokens=77))
        assert decision["reason"] == "cached"
        assert decision["prefill"] == noted[0]["prefill"]
        assert decision["output_tokens"] == 77
        assert decision["outcome"] is None or decision["outcome"]["outcome"] is None
        assert [len(engine.requests) for engine in engines] == before
        assert running.idle()
        assert [one["request_id"] for one in await told(running)] == [one["request_id"] for one in noted]
        after = await running.metrics()
        for name in ("pd_proxy_placement_decisions_total", "pd_proxy_requests_total", "pd_proxy_prefix_index_entries"):
            assert {k: v for k, v in after.items() if k.startswith(name)} == {
                k: v for k, v in metrics.items() if k.startswith(name)
            }, name
        # the request itself goes there too
        headers = {"x-pd-proxy-explain": "1"}
        answer = await running.http.post(CHAT, json=chat(LONG, max_tokens=77), headers=headers)
        assert json.loads(answer.headers[DECISION])["prefill"] == decision["prefill"]


async def test_a_session_from_a_header_counts_in_the_explained_decision() -> None:
    async with pools(4, 1, policy={"prefill": "session"}) as (running, _, _):
        for name in (b"a", b"b", b"c", b"\xff\xfe" * 1000):
            headers = [(b"x-session-id", name), (b"x-pd-proxy-explain", b"1")]
            answer = await running.http.post("/admin/explain", json=chat(), headers=headers)
            real = await running.http.post(CHAT, json=chat(), headers=headers)
            assert json.loads(real.headers[DECISION])["prefill"] == answer.json()["prefill"]


async def test_the_bound_on_answers_counts_in_the_explained_decision() -> None:
    async with pools(1, 1, limits={"default_max_tokens": 30, "max_tokens": 100}) as (running, _, _):
        asked = chat()
        del asked["max_tokens"]
        assert (await explained(running, asked))["output_tokens"] == 30
        assert (await running.http.post("/admin/explain", json=chat(max_tokens=101))).status_code == 400


async def test_a_decision_is_explained_for_any_route() -> None:
    async with pools(1, 1) as (running, _, _):
        decision = await explained(running, completion(), endpoint="completions")
        assert (decision["endpoint"], decision["pool"]) == ("completions", "decode")
        decision = await explained(running, completion(n=3), endpoint="completions")
        assert decision["prefill"] is None
        assert decision["fallback"] == "n"
        assert {one["rule"] for one in decision["left_out"] if one["role"] == "prefill"} == {"unsplit"}


async def test_that_no_backend_can_serve_a_request_is_a_decision() -> None:
    async with pools(1, 1) as (running, [p], [d]):
        for engine in (p, d):
            engine.faults.add("refuse")
        await until(lambda: not any(one.up for one in running.gateway.fleet))
        decision = await explained(running, chat())
        assert decision["error"]
        assert decision["left_out_by"] == {"down": 2}


@pytest.mark.parametrize(
    ("body", "query", "status"),
    [
        (b"no json", "", 400),
        (b"[]", "", 400),
        (b"{}", "?endpoint=embeddings", 400),
        (b"{}", "?what=else", 400),
        (b'{"model":"sim","messages":"none"}', "", 200),  # engines would refuse it, the gateway does not
        (b'{"model":"other","messages":[]}', "", 404),
        (b'{"model":"sim","input":"x","previous_response_id":"resp_unknown"}', "?endpoint=responses", 404),
    ],
)
async def test_a_body_without_a_possible_decision_is_refused(body: bytes, query: str, status: int) -> None:
    async with pools(1, 1) as (running, _, _):
        answer = await running.http.post(f"/admin/explain{query}", content=body)
        assert answer.status_code == status, answer.text


async def test_the_longest_body_to_explain_is_that_of_a_request() -> None:
    async with pools(1, 1, limits={"request_body": 3_000_000}) as (running, _, _):
        decision = await explained(running, chat("x" * 2_000_000))
        assert decision["prompt_tokens"] > 100_000
        answer = await running.http.post("/admin/explain", json=chat("x" * 3_000_000))
        assert answer.status_code == 413


@pytest.mark.parametrize(("method", "path"), [("GET", "/admin/decisions"), ("POST", "/admin/explain")])
async def test_decisions_and_explanations_are_for_operators(method: str, path: str) -> None:
    async with pools(1, 1, **KEYS) as (running, _, _):
        for headers in ({}, {"authorization": "Bearer client"}, {"x-api-key": "client"}):
            answer = await running.http.request(method, path, json=chat(), headers=headers)
            assert answer.status_code == 401
        assert (await running.http.request(method, path, json=chat(), headers=OPERATOR)).status_code == 200
    async with pools(1, 1, admin_key=None) as (running, _, _):  # programs on this machine may read
        assert (await running.http.request(method, path, json=chat())).status_code == 200
        answer = await running.http.request(method, path, json=chat(), headers={"origin": "http://page"})
        assert answer.status_code == 403


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "what=else", f"request_id={'r' * 129}"])
async def test_bad_parameters_are_refused(query: str) -> None:
    async with running_gateway(ready=False) as running:
        assert (await running.http.get(f"/admin/decisions?{query}")).status_code == 400


# `pd-proxy explain`


async def command(*argv: str) -> int:
    """Run `pd-proxy explain` in a thread, since it has an event loop of its own."""
    return await asyncio.to_thread(cli.main, ["explain", *argv])


@pytest.fixture
def body(tmp_path: Path) -> str:
    file = tmp_path / "body.json"
    file.write_text(json.dumps(chat(LONG)))
    return str(file)


@pytest.fixture
def key(tmp_path: Path) -> str:
    file = tmp_path / "key"
    file.write_text("operator\n")
    return str(file)


async def test_the_command_prints_where_a_request_would_go(
    body: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with pools(2, 1, **KEYS) as (running, prefills, [d]):
        assert await command("--request", body, "--url", running.url, "--admin-key-file", key) == 0
        out = capsys.readouterr().out
        lines = out.splitlines()
        assert lines[0].startswith("request   chat, ")
        assert f"decode    {d.url.removeprefix('http://')}" in lines
        assert any(line.startswith("reason    ") for line in lines)
        for engine in (*prefills, d):
            assert out.count(engine.url.removeprefix("http://")) >= 1
        assert sum(line.startswith("*") for line in lines) == 2
        assert not [request for request in d.requests if request.path == CHAT]
        assert await command("--request", body, "--url", running.url, "--admin-key-file", key, "--json") == 0
        assert json.loads(capsys.readouterr().out)["decode"] == d.url


async def test_the_command_exits_with_1_where_no_backend_can_serve_the_request(
    body: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with pools(1, 1, **KEYS) as (running, [p], [d]):
        for engine in (p, d):
            engine.faults.add("refuse")
        await until(lambda: not any(one.up for one in running.gateway.fleet))
        assert await command("--request", body, "--url", running.url, "--admin-key-file", key) == 1
        out = capsys.readouterr().out
        assert "nobody    no backend that could answer is up" in out
        assert out.count(" down\n") == 2


async def test_the_key_may_be_in_the_environment(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pools(1, 1, **KEYS) as (running, _, _):
        assert await command("--request", body, "--url", running.url) == 2
        monkeypatch.setenv("PD_PROXY_ADMIN_KEY", "operator")
        assert await command("--request", body, "--url", running.url.removeprefix("http://")) == 0


async def test_the_command_reports_why_it_could_not_ask_the_gateway(
    body: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def said(*argv: str) -> str:
        assert await command(*argv) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("pd-proxy: ")
        assert "operator" not in captured.err
        return captured.err

    async with pools(1, 1, **KEYS) as (running, _, [d]):
        at = ("--url", running.url, "--admin-key-file", key)
        assert "answered 401: this needs the admin key" in await said("--request", body, "--url", running.url)
        (tmp_path / "bad.json").write_text("{")
        assert "answered 400" in await said("--request", str(tmp_path / "bad.json"), *at)
        assert "No such file" in await said("--request", str(tmp_path / "none"), *at)
        (tmp_path / "empty").write_text(" \n")
        assert "is empty" in await said("--request", str(tmp_path / "empty"), *at)
        missing = str(tmp_path / "none")
        assert "No such file" in await said("--request", body, "--url", running.url, "--admin-key-file", missing)
        (tmp_path / "two").write_text("two\nwords")
        two = str(tmp_path / "two")
        assert "must be a single word" in await said("--request", body, "--url", running.url, "--admin-key-file", two)
        assert "is it a pd-proxy" in await said("--request", body, "--url", d.url)
        assert "is not a gateway's URL" in await said("--request", body, "--url", "ftp://x")
        gone = running.url
    assert "could not be asked: " in await said("--request", body, "--url", gone)


async def test_the_command_can_use_the_admin_socket(
    body: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "admin.sock"
    async with pools(1, 1, admin_key=None, admin_socket=str(path)) as (running, [p], _):
        assert running.gateway.admin is not None
        server = TestServer(uvicorn.Config(running.gateway.admin, uds=str(path), lifespan="off", log_level="error"))
        serving = asyncio.create_task(server.serve())
        try:
            await server.listening.wait()
            assert await command("--request", body, "--admin-socket", str(path)) == 0
            assert f"prefill   {p.url.removeprefix('http://')}" in capsys.readouterr().out
        finally:
            server.should_exit = True
            await serving
    assert await command("--request", body, "--admin-socket", str(tmp_path / "none")) == 2
    assert "could not be asked" in capsys.readouterr().err


# Metrics


async def test_metrics_show_expected_and_actual_cache_hits() -> None:
    async with pools(1, 1) as (running, [p], _):
        for _ in range(2):
            assert (await running.http.post(CHAT, json=chat(LONG))).status_code == 200
        metrics = await running.metrics()
        labels = f'{{backend="{p.url}",pool="prefill"}}'
        assert metrics[f"pd_proxy_prefix_expected_tokens_total{labels}"] > 0
        assert metrics[f"pd_proxy_prefix_index_tokens{labels}"] > 0
        assert metrics["pd_proxy_prefix_index_entries"] > 0
        decisions = {k: v for k, v in metrics.items() if k.startswith("pd_proxy_placement_decisions_total")}
        assert sum(decisions.values()) == 2
