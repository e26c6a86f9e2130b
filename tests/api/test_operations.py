"""Probes, models, versions, load, metrics and the example script's own routes."""

from __future__ import annotations

import asyncio

from pd_proxy import __version__
from pd_proxy.fleet.readiness import not_ready
from prometheus_client.parser import text_string_to_metric_families

from tests.support import chat, pools, running_gateway, simulators, until

CHAT = "/v1/chat/completions"


async def test_the_gateway_starts_alone_is_alive_and_says_why_it_is_not_ready() -> None:
    async with running_gateway(["http://127.0.0.1:9"], ["http://127.0.0.1:9/"[:-1] + "1"], ready=False) as running:
        assert (await running.http.get("/health")).json() == {"status": "alive"}
        answer = await running.http.get("/ready")
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "no prefill and no decode backend is up"
        assert answer.headers["retry-after"] == "1"
        request = await running.http.post(CHAT, json=chat())
        assert request.status_code == 503 and request.json()["error"]["code"] == "no_backend"
        assert (await running.http.get("/v1/models")).status_code == 503


async def test_readiness_follows_the_backends() -> None:
    async with pools() as (running, _, [d]):
        assert (await running.http.get("/ready")).status_code == 200
        d.kill()
        await until(lambda: not_ready(running.gateway.fleet) == "no decode backend is up")
        assert (await running.http.get("/ready")).status_code == 503
        await d.restart()
        await until(lambda: not not_ready(running.gateway.fleet))
        assert (await running.http.get("/ready")).status_code == 200


async def test_instances_are_added_and_removed_as_with_the_example_script() -> None:
    async with pools(1, 1) as (running, _, [d]), simulators("decode", "prefill") as [d2, p2]:
        fleet = running.gateway.fleet
        added = await running.http.post(
            "/instances/add", json={"type": "decode", "instances": d2.url.removeprefix("http://")}
        )
        assert added.status_code == 200
        assert added.json()["current_decode_instances"] == [u.removeprefix("http://") for u in (d.url, d2.url)]
        await until(lambda: len(fleet.candidates("decode", "sim")) == 2)
        await running.http.post("/instances/add", json={"type": "prefill", "instances": [p2.url]})
        await until(lambda: len(fleet.candidates("prefill", "sim")) == 2)
        assert (await running.http.get("/healthcheck")).json() == {
            "status": "ok",
            "prefill_instances": 2,
            "decode_instances": 2,
            "request_num": 0,
        }
        removed = await running.http.post("/instances/remove", json={"type": "decode", "instances": [d.url]})
        assert removed.json()["current_decode_instances"] == [d2.url.removeprefix("http://")]
        before = d.served
        for _ in range(4):
            assert (await running.http.post(CHAT, json=chat())).status_code == 200
        assert d.served == before
        metrics = await running.metrics()
        assert f'pd_proxy_backend_up{{backend="{d.url}",pool="decode"}}' not in metrics


async def test_a_removed_backend_finishes_its_requests() -> None:
    async with pools(1, 2, engine={"step_time": 0.01}) as (running, _, decode):
        request = asyncio.create_task(running.http.post(CHAT, json=chat(max_tokens=50, ignore_eos=True)))
        await until(lambda: any(d.engine.running for d in decode))
        [busy] = [d for d in decode if d.engine.running]
        await running.http.post("/instances/remove", json={"type": "decode", "instances": [busy.url]})
        assert (await request).json()["usage"]["completion_tokens"] == 50
        await until(lambda: len(running.gateway.fleet.pool("decode")) == 1)


async def test_invalid_changes_of_the_pools_are_400_and_change_nothing() -> None:
    async with pools() as (running, [p], [d]):
        for path, body in (
            ("/instances/add", {"type": "other", "instances": ["h:1"]}),
            ("/instances/add", {"type": "decode", "instances": ["ftp://h:1"]}),
            ("/instances/add", {"type": "decode", "instances": [p.url]}),
            ("/instances/remove", {"type": "decode", "instances": ["h:1"]}),
            ("/instances/add", {"type": "decode"}),
            ("/instances/add", []),
        ):
            answer = await running.http.post(path, json=body)
            assert answer.status_code == 400, (path, body)
            assert answer.json()["error"]["code"] == "invalid_request"
        assert [b.url for b in running.gateway.fleet] == [p.url, d.url]


async def test_operators_need_the_admin_key() -> None:
    change = {"type": "decode", "instances": ["h:1"]}
    async with pools(admin_key="secret") as (running, _, _):
        assert (await running.http.post("/instances/add", json=change)).status_code == 401
        wrong = {"authorization": "Bearer wrong"}
        assert (await running.http.post("/reset_prefix_cache", headers=wrong)).status_code == 401
        right = {"authorization": "Bearer secret"}
        assert (await running.http.post("/reset_prefix_cache", headers=right)).status_code == 200


async def test_reset_prefix_cache_reaches_every_backend_and_names_those_that_failed() -> None:
    async with pools(1, 2) as (running, [p], decode):
        await running.http.post(CHAT, json=chat())
        await running.http.post(CHAT, json=chat())
        hits = p.engine.stats.local_cache_hit
        assert hits > 0, "the same prompt again is in the prefix cache"
        assert (await running.http.post("/reset_prefix_cache")).status_code == 200
        await running.http.post(CHAT, json=chat())
        assert p.engine.stats.local_cache_hit == hits
        decode[0].kill()
        answer = await running.http.post("/reset_prefix_cache")
        assert answer.status_code == 500
        assert answer.json()["failed"] == [decode[0].url]


async def test_metrics_are_served_as_text_and_as_openmetrics() -> None:
    async with pools(first_token="decode") as (running, [p], [d]):
        await running.http.post(CHAT, json=chat(stream=True))
        text = await running.http.get("/metrics")
        assert text.headers["content-type"].startswith("text/plain")
        for name in (
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "time_per_output_token_seconds",
            "request_duration_seconds",
            "prefill_duration_seconds",
            "handoff_duration_seconds",
            "requests_total",
            "tokens_total",
            "retries_total",
            "fallbacks_total",
            "client_disconnects_total",
            "backend_up",
            "backend_inflight_requests",
            "backend_inflight_tokens",
            "handoffs_pending",
            "event_loop_delay_seconds",
        ):
            assert f"pd_proxy_{name}" in text.text, name
        samples = await running.metrics()
        for pool, engine in (("prefill", p), ("decode", d)):
            assert samples[f'pd_proxy_time_to_first_token_seconds_count{{backend="{engine.url}",pool="{pool}"}}'] == 1
        assert samples[f'pd_proxy_inter_token_latency_seconds_count{{backend="{d.url}",pool="decode"}}'] == 19
        opened = await running.http.get("/metrics", headers={"accept": "application/openmetrics-text"})
        assert opened.headers["content-type"].startswith("application/openmetrics-text")
        assert opened.text.endswith("# EOF\n")


async def test_the_metrics_that_tests_read_equal_those_of_the_page() -> None:
    async with pools() as (running, _, _):
        assert (await running.http.post("/v1/chat/completions", json=chat())).status_code == 200
        await until(running.idle)
        page = (await running.http.get("/metrics")).text
        said = {
            f"{sample.name}{sorted(sample.labels.items())}"
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        }
        read = {
            f"{sample.name}{sorted(sample.labels.items())}"
            for family in running.gateway.registry.collect()
            for sample in family.samples
        }
        assert said == read and len(read) > 100
        counted = (await running.metrics())['pd_proxy_requests_total{endpoint="chat",model="sim",outcome="ok"}']
        assert f'pd_proxy_requests_total{{endpoint="chat",model="sim",outcome="ok"}} {counted}' in page


async def test_labels_are_bounded_whatever_clients_send() -> None:
    async with pools() as (running, _, _):
        for n in range(50):
            await running.http.post(CHAT, json=chat(model=f"model-{n}"))
            await running.http.post(f"/v1/route-{n}", json={})
        samples = await running.metrics()
        assert {k for k in samples if k.startswith("pd_proxy_requests_total")} == {
            'pd_proxy_requests_total{endpoint="chat",model="other",outcome="model_not_found"}'
        }


async def test_version_shows_gateway_and_engines_without_addresses() -> None:
    async with pools(1, 2) as (running, [p], _):
        answer = await running.http.get("/version")
        assert answer.json() == {
            "version": __version__,
            "backends": [
                {"role": "prefill", "kind": "vllm", "version": "0.32.0", "count": 1},
                {"role": "decode", "kind": "vllm", "version": "0.32.0", "count": 2},
            ],
        }
        assert str(p.port) not in answer.text


async def test_load_shows_the_requests_and_tokens_of_the_fleet() -> None:
    async with pools(1, 2) as (running, [p], _):
        assert (await running.http.get("/load")).json() == {
            "server_load": 0,
            "waiting": 0,
            "pools": {
                "prefill": {"backends": 1, "up": 1, "requests": 0, "tokens": 0},
                "decode": {"backends": 2, "up": 2, "requests": 0, "tokens": 0},
            },
        }
        p.faults.add("hang", leg="prefill")
        request = asyncio.create_task(running.http.post(CHAT, json=chat()))
        await until(lambda: bool(p.requests))
        load = (await running.http.get("/load")).json()
        assert (load["server_load"], load["pools"]["prefill"]["requests"]) == (1, 1)
        assert load["pools"]["prefill"]["tokens"] > 0
        request.cancel()
        await until(running.idle)


async def test_version_and_load_are_for_clients() -> None:
    async with running_gateway(["http://127.0.0.1:9"], api_keys="k", ready=False) as running:
        for path in ("/version", "/load"):
            assert (await running.http.get(path)).status_code == 401
            assert (await running.http.get(path, headers={"authorization": "Bearer k"})).status_code == 200


async def test_a_model_may_have_slashes_in_its_name() -> None:
    async with (
        simulators("mixed", model="org/family/model-7b") as [engine],
        running_gateway(mixed=[engine.url]) as running,
    ):
        for name in ("org/family/model-7b", "org%2Ffamily%2Fmodel-7b"):
            answer = await running.http.get(f"/v1/models/{name}")
            assert (answer.status_code, answer.json()["id"]) == (200, "org/family/model-7b")
        answer = await running.http.get("/v1/models/org/family")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_nim_is_probed_on_its_own_routes() -> None:
    async with (
        simulators("mixed", surface="nim") as [engine],
        running_gateway(mixed=[engine.url], kind="nim") as running,
    ):
        assert (await running.http.post(CHAT, json=chat())).status_code == 200
        assert set(engine.probes) == {"/v1/health/ready", "/v1/version", "/v1/metrics"}
        assert (await running.http.get("/version")).json()["backends"][0]["version"] == "0.32.0"
