"""Operations that an operator starts on several engines."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote

import pytest
from pd_proxy.api.admin.backends import backend_id
from pd_proxy.api.admin.fanout import FanOut, SleepQuery
from pd_proxy.http.control import Control

from tests.api.test_single import mixed
from tests.support import chat, pools, running_gateway, simulators, until

CHAT = "/v1/chat/completions"


def outcomes(answer: Any) -> list[tuple[str, str, bool, int | None]]:
    return [(one["id"], one["role"], one["ok"], one["status"]) for one in answer.json()["backends"]]


@pytest.mark.parametrize("operation", ["reset_prefix_cache", "start_profile", "stop_profile"])
async def test_every_engine_is_called_and_reported(operation: str) -> None:
    async with pools(1, 2) as (running, [p], [d, d2]):
        answer = await running.http.post(f"/admin/{operation}")
        assert (answer.status_code, answer.json()["operation"]) == (200, operation)
        assert outcomes(answer) == [
            (backend_id(p.url), "prefill", True, 200),
            (backend_id(d.url), "decode", True, 200),
            (backend_id(d2.url), "decode", True, 200),
        ]
        assert all(engine.operations[-1] == (f"/{operation}", "") for engine in (p, d, d2))


async def test_backends_can_be_chosen_by_role_or_by_name() -> None:
    async with pools(1, 2) as (running, [p], [d, d2]):
        answer = await running.http.post("/admin/start_profile?role=decode")
        assert len(outcomes(answer)) == 2 and d.profiling and d2.profiling and not p.profiling
        for name in (backend_id(p.url), quote(p.url, safe="")):
            answer = await running.http.post(f"/admin/start_profile?backend={name}")
            assert outcomes(answer) == [(backend_id(p.url), "prefill", True, 200)]
        for query in ("backend=nobody:1", "role=mixed", f"role=decode&backend={backend_id(p.url)}"):
            answer = await running.http.post(f"/admin/start_profile?{query}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "backend_not_found"), query


async def test_a_dead_engine_is_reported_and_the_others_are_called() -> None:
    async with pools(1, 1) as (running, [p], [d]):
        p.kill()
        answer = await running.http.post("/admin/reset_prefix_cache")
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "fan_out_failed")
        assert outcomes(answer) == [
            (backend_id(p.url), "prefill", False, None),
            (backend_id(d.url), "decode", True, 200),
        ]
        assert "could not be asked" in answer.json()["backends"][0]["error"]


async def test_an_engine_without_the_operation_is_reported() -> None:
    async with mixed(engine={"dev_mode": False, "profiler": False}) as (running, _):
        answer = await running.http.post("/admin/start_profile")
        assert (answer.status_code, outcomes(answer)[0][2:]) == (502, (False, 404))
    async with mixed(kind="openai", engine={"surface": "openai"}) as (running, [engine]):
        answer = await running.http.post("/admin/start_profile")
        [outcome] = answer.json()["backends"]
        assert (outcome["status"], outcome["error"]) == (None, "a backend of the kind openai has no start_profile")
        assert not engine.operations


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/admin/reset_prefix_cache?reset_running_requests=true&reset_external=false", "reset_running_requests=true"),
        ("/reset_prefix_cache?reset_external=1", "reset_external=true"),
        ("/admin/sleep?level=2&mode=wait", "level=2&mode=wait"),
        ("/admin/sleep", "level=1&mode=abort"),
        ("/admin/wake_up?tags=weights&tags=kv_cache", "tags=weights&tags=kv_cache"),
        ("/admin/wake_up", ""),
    ],
)
async def test_the_parameters_of_vllm_are_passed_on(path: str, sent: str) -> None:
    async with mixed() as (running, [engine]):
        assert (await running.http.post(path)).status_code == 200
        assert [query for asked, query in engine.operations if asked in path.partition("?")[0]] == [sent]


@pytest.mark.parametrize(
    "path",
    [
        "/admin/reset_prefix_cache?reset_running_requests=perhaps",
        "/admin/reset_prefix_cache?other=1",
        "/reset_prefix_cache?other=1",
        "/admin/sleep?level=3",
        "/admin/sleep?mode=kill",
        "/admin/sleep?drain=-1",
        "/admin/wake_up?tags=everything",
        "/admin/start_profile?role=all",
        "/start_profile?x=1",
    ],
)
async def test_any_other_parameter_is_refused(path: str) -> None:
    async with mixed() as (running, [engine]):
        before = list(engine.operations)
        answer = await running.http.post(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
        assert engine.operations == before


async def test_the_paths_of_the_example_script_exist() -> None:
    async with pools(1, 1) as (running, [p], [d]):
        answer = await running.http.post("/reset_prefix_cache")
        assert (answer.status_code, answer.content) == (200, b"")
        assert (await running.http.post("/start_profile")).json()["operation"] == "start_profile"
        assert p.profiling and d.profiling
        assert (await running.http.post("/stop_profile")).status_code == 200
        assert not p.profiling and not d.profiling
        d.kill()
        answer = await running.http.post("/reset_prefix_cache")
        assert (answer.status_code, answer.json()["failed"]) == (500, [d.url])


async def test_only_operators_may_use_these_routes() -> None:
    async with running_gateway(["http://127.0.0.1:9"], admin_key="secret", ready=False) as running:
        for method, path in (
            *(("POST", f"/admin/{name}") for name in ("reset_prefix_cache", "start_profile", "stop_profile")),
            *(("POST", path) for path in ("/admin/sleep", "/admin/wake_up", "/reset_prefix_cache", "/start_profile")),
            ("POST", "/stop_profile"),
            ("GET", "/admin/is_sleeping"),
        ):
            assert (await running.http.request(method, path)).status_code == 401, path


async def test_a_backend_that_is_asleep_gets_no_requests_until_it_is_woken() -> None:
    async with mixed(2) as (running, [one, other]):
        answer = await running.http.post(f"/admin/sleep?backend={backend_id(one.url)}")
        assert answer.status_code == 200 and one.asleep and not other.asleep
        for _ in range(4):
            assert (await running.http.post(CHAT, json=chat())).status_code == 200
        assert len(other.requests) == 4 and not one.requests
        shown = (await running.http.get(f"/admin/backends/{backend_id(one.url)}")).json()
        assert (shown["state"], shown["draining"]) == ("down", False)
        asleep = await running.http.get("/admin/is_sleeping")
        assert [o["answer"]["is_sleeping"] for o in asleep.json()["backends"]] == [True, False]
        backend = running.gateway.fleet.pool("mixed")[0]
        await until(lambda: "it is asleep" in backend.reason)
        assert not backend.up, "its /health says that it is well"
        assert (await running.http.post("/admin/wake_up")).status_code == 200
        await until(lambda: backend.up)
        assert (await running.http.post(CHAT, json=chat())).status_code == 200


async def test_an_engine_that_slept_before_the_gateway_started_gets_no_requests() -> None:
    async with simulators("mixed") as [engine]:
        engine.asleep = True
        async with running_gateway(mixed=[engine.url], ready=False) as running:
            [backend] = running.gateway.fleet
            await until(lambda: "it is asleep" in backend.reason)
            assert (await running.http.post(CHAT, json=chat())).status_code == 503
            engine.asleep = False
            await until(lambda: backend.up)


async def test_the_requests_of_a_backend_end_before_it_sleeps() -> None:
    async with mixed(engine={"step_time": 0.01}) as (running, [engine]):
        request = asyncio.create_task(running.http.post(CHAT, json=chat(max_tokens=30, ignore_eos=True)))
        await until(lambda: engine.engine.running == 1)
        assert (await running.http.post("/admin/sleep")).status_code == 200
        assert request.done() or (await request).status_code == 200
        assert (await request).json()["usage"]["completion_tokens"] == 30
        assert engine.asleep


async def test_a_backend_in_use_is_not_put_to_sleep_unless_forced() -> None:
    async with mixed() as (running, [engine]):
        engine.faults.add("hang", leg="local")
        request = asyncio.create_task(running.http.post(CHAT, json=chat()))
        await until(lambda: bool(engine.requests))
        answer = await running.http.post("/admin/sleep?drain=0.05")
        [outcome] = answer.json()["backends"]
        assert (answer.status_code, outcome["status"]) == (502, None)
        assert outcome["error"].startswith("not put to sleep: 1 request(s) and 0 hand-off(s) still need it")
        assert not engine.asleep
        [backend] = running.gateway.fleet
        assert backend.up and not backend.draining
        assert (await running.http.post("/admin/sleep?drain=0&force=true")).status_code == 200
        assert engine.asleep
        request.cancel()


async def test_a_backend_that_was_draining_stays_draining() -> None:
    async with mixed() as (running, _):
        [backend] = running.gateway.fleet
        running.gateway.fleet.drain(backend)
        assert (await running.http.post("/admin/sleep")).status_code == 200
        assert (await running.http.post("/admin/wake_up")).status_code == 200
        await until(lambda: backend.up)
        assert backend.draining


class OtherWorkers:
    """Stands in for the gateway's other workers, which need the backend for a while."""

    def __init__(self, looks: int) -> None:
        self.told: list[str] = []
        self._looks = looks

    async def post(self, target: str) -> None:
        self.told.append(target)

    async def drained(self, url: str) -> bool:
        self._looks -= 1
        return self._looks < 0


@pytest.mark.parametrize(("looks", "sleeps"), [(3, True), (10**6, False)])
async def test_all_workers_drain_a_backend_before_it_sleeps(looks: int, sleeps: bool) -> None:
    async with mixed() as (running, [engine]):
        others = OtherWorkers(looks)
        engines = FanOut(running.gateway.fleet, Control(5.0), others)  # type: ignore[arg-type]
        report = await engines.sleep(SleepQuery(drain=5.0 if sleeps else 0.1))
        assert (report.backends[0].ok, engine.asleep) == (sleeps, sleeps)
        name = quote(engine.url, safe="")
        assert others.told == [f"/admin/backends/{name}/drain", f"/admin/backends/{name}/undrain"]


# Adapters

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ADAPTER = {"lora_name": "tuned", "lora_path": "/adapters/tuned"}


async def test_an_adapter_is_loaded_into_both_legs_engines_and_served_at_once() -> None:
    async with pools(2, 2) as (running, prefill, decode):
        fleet = running.gateway.fleet
        assert (await running.http.post(CHAT, json=chat(model="tuned"))).status_code == 404
        answer = await running.http.post(LOAD, json=ADAPTER)
        assert (answer.status_code, len(outcomes(answer))) == (200, 4)
        assert all("tuned" in (backend.models or {}) for backend in fleet)
        for _ in range(3):
            served = await running.http.post(CHAT, json=chat(model="tuned"))
            assert served.status_code == 200 and served.json()["model"] == "tuned"
        assert "tuned" in [card["id"] for card in (await running.http.get("/v1/models")).json()["data"]]
        assert (await running.http.post(LOAD, json={**ADAPTER, "load_inplace": True})).status_code == 200
        answer = await running.http.post(UNLOAD, json={"lora_name": "tuned"})
        assert (answer.status_code, len(outcomes(answer))) == (200, 4)
        assert not any("tuned" in (backend.models or {}) for backend in fleet)
        assert (await running.http.post(CHAT, json=chat(model="tuned"))).status_code == 404
        assert len(prefill) == len(decode) == 2


async def test_a_refusal_of_all_engines_keeps_their_status() -> None:
    async with pools() as (running, [p], _):
        assert (await running.http.post(LOAD, json={**ADAPTER, "lora_name": "sim"})).status_code == 400
        answer = await running.http.post(UNLOAD, json={"lora_name": "tuned"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "backend_not_found")
        assert (await running.http.post(f"{LOAD}?backend={backend_id(p.url)}", json=ADAPTER)).status_code == 200
        answer = await running.http.post(LOAD, json=ADAPTER)
        assert answer.status_code == 502, "one has it and the other has not"
        assert sorted(one[2:] for one in outcomes(answer)) == [(False, 400), (True, 200)]
        answer = await running.http.post(UNLOAD, json={"lora_name": "tuned"})
        assert (answer.status_code, len(outcomes(answer))) == (200, 2)


@pytest.mark.parametrize(
    "body",
    [{}, [], {"lora_name": "a"}, {**ADAPTER, "lora_name": ""}, {**ADAPTER, "lora_path": 1}, {**ADAPTER, "other": 1}],
)
async def test_an_invalid_load_request_reaches_no_engine(body: Any) -> None:
    async with pools() as (running, _, _):
        answer = await running.http.post(LOAD, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
        assert (await running.http.get("/v1/models")).json()["data"][0]["id"] == "sim"


async def test_an_adapter_goes_to_the_engines_of_its_base_model() -> None:
    async with (
        simulators("mixed", model="one") as [one],
        simulators("mixed", model="two") as [two],
        running_gateway(mixed=[one.url, two.url]) as running,
    ):
        answer = await running.http.post(LOAD, json=ADAPTER)
        assert answer.status_code == 400 and "?model=): one, two" in answer.json()["error"]["message"]
        answer = await running.http.post(f"{LOAD}?model=two", json=ADAPTER)
        assert outcomes(answer) == [(backend_id(two.url), "mixed", True, 200)]
        assert (await running.http.post(f"{LOAD}?model=three", json=ADAPTER)).status_code == 404
        answer = await running.http.post(f"{UNLOAD}?model=one", json={"lora_name": "tuned"})
        assert answer.status_code == 404
        answer = await running.http.post(UNLOAD, json={"lora_name": "tuned"})
        assert outcomes(answer) == [(backend_id(two.url), "mixed", True, 200)]
        assert len(one.adapters.cards()) == len(two.adapters.cards()) == 1


async def test_only_operators_may_load_adapters() -> None:
    async with running_gateway(["http://127.0.0.1:9"], api_keys="client", ready=False) as running:
        for path in (LOAD, UNLOAD):
            answer = await running.http.post(path, json=ADAPTER, headers={"authorization": "Bearer client"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
