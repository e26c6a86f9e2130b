"""/admin/backends: the list of backends, and draining."""

from __future__ import annotations

import asyncio
from urllib.parse import quote

import pytest
from pd_proxy.api.admin.backends import backend_id

from tests.support import chat, pools, running_gateway, text_of, until

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://10.0.0.1:8000", "10.0.0.1:8000"),
        ("http://decode-0.pool.svc:8000", "decode-0.pool.svc:8000"),
        ("http://decode-0", "decode-0"),
        ("https://decode-0:8000", "decode-0-d8062b7b"),
        ("http://decode-0:8000/engines/a", "decode-0-c1a549f9"),
        ("http://[fe80::1]:8000", "fe80-1-f4d6c6de"),
    ],
)
def test_a_backends_id_is_its_host_and_port_and_other_urls_have_a_hash(url: str, name: str) -> None:
    assert backend_id(url) == name
    assert quote(name, safe=":") == name


async def test_the_list_shows_the_state_of_each_backend() -> None:
    async with pools(1, 2) as (running, [p], [d, _]):
        listed = (await running.http.get("/admin/backends")).json()["backends"]
        assert [one["role"] for one in listed] == ["prefill", "decode", "decode"]
        shown = {key: value for key, value in listed[0].items() if key != "version"}
        assert shown == {
            "id": p.url.removeprefix("http://"),
            "role": "prefill",
            "kind": "vllm",
            "url": p.url,
            "group": "default",
            "connector": "nixl",
            "state": "up",
            "up": True,
            "reason": "",
            "draining": False,
            "drained": False,
            "removed": False,
            "ejected": {},
            "slow_start": None,
            "inflight_requests": 0,
            "inflight_tokens": 0,
            "open_handoffs": 0,
            "models": ["sim"],
            "handoff": {
                **{"state": "never", "ever": False, "with": None, "at": None},
                **{"code": None, "reason": None, "advice": None},
            },
        }
        d.faults.add("status", status=500, leg="decode")
        await until(lambda: running.gateway.fleet.pool("decode")[0].up)
        while not running.gateway.fleet.outlier_detector.ejections:
            assert (await running.http.post(CHAT, json=chat())).status_code == 200
        ejected = (await running.http.get(f"/admin/backends/{backend_id(d.url)}")).json()
        assert (ejected["state"], ejected["up"]) == ("ejected", True)
        assert ejected["ejected"]["decode"]["reason"] == "consecutive"
        assert 5 < ejected["ejected"]["decode"]["seconds_left"] <= 10


@pytest.mark.parametrize("named_by", ["id", "url"])
async def test_a_drained_backend_gets_no_new_requests_until_it_is_undrained(named_by: str) -> None:
    async with pools(1, 2) as (running, _, [d, other]):
        name = backend_id(d.url) if named_by == "id" else quote(d.url, safe="")
        answer = await running.http.post(f"/admin/backends/{name}/drain")
        assert answer.status_code == 200
        assert (answer.json()["state"], answer.json()["drained"]) == ("draining", True)
        metrics = await running.metrics()
        assert metrics[f'pd_proxy_backend_state{{backend="{d.url}",pool="decode",state="draining"}}'] == 1
        assert metrics[f'pd_proxy_backend_up{{backend="{d.url}",pool="decode"}}'] == 0
        served = d.served
        for _ in range(6):
            assert (await running.http.post(CHAT, json=chat())).status_code == 200
        assert d.served == served
        await running.http.post(f"/admin/backends/{backend_id(other.url)}/drain")
        ready = await running.http.get("/ready")
        assert ready.json()["error"]["message"] == "no decode backend is up (2 draining)"
        assert (await running.http.post(f"/admin/backends/{name}/undrain")).json()["state"] == "up"
        assert (await running.http.get("/ready")).status_code == 200
        assert (await running.http.post(CHAT, json=chat())).status_code == 200
        assert d.served > served


async def test_a_draining_backend_finishes_its_requests() -> None:
    async with pools(1, 1, engine={"step_time": 0.01}) as (running, _, [d]):
        request = asyncio.create_task(running.http.post(CHAT, json=chat(max_tokens=30, ignore_eos=True)))
        await until(lambda: d.engine.running == 1)
        answer = (await running.http.post(f"/admin/backends/{backend_id(d.url)}/drain")).json()
        assert (answer["inflight_requests"], answer["drained"]) == (1, False)
        assert (await request).json()["usage"]["completion_tokens"] == 30
        assert (await running.http.get(f"/admin/backends/{backend_id(d.url)}")).json()["drained"] is True


async def test_a_prefill_backend_is_kept_until_its_open_hand_offs_are_claimed() -> None:
    async with pools(2, 1, engine={"step_time": 0.005}) as (running, prefill, [d]):
        expected = text_of((await running.http.post(CHAT, json=chat())).json())
        d.faults.add("delay_first_byte", leg="decode", delay_s=0.5, count=1)
        fleet = running.gateway.fleet
        request = asyncio.create_task(running.http.post(CHAT, json=chat()))
        await until(lambda: fleet.handoffs_pending == 1)
        [holder] = [backend for backend in fleet if backend.open_handoffs]
        removed = await running.http.post("/instances/remove", json={"type": "prefill", "instances": [holder.url]})
        assert removed.status_code == 200
        shown = (await running.http.get(f"/admin/backends/{backend_id(holder.url)}")).json()
        assert (shown["state"], shown["open_handoffs"], shown["inflight_requests"]) == ("draining", 1, 0)
        assert (shown["drained"], shown["removed"]) == (False, True)
        fleet.forget_idle()
        assert holder in fleet.pool("prefill")
        assert text_of((await request).json()) == expected
        await until(lambda: holder not in fleet.pool("prefill"))
        gone = await running.http.get(f"/admin/backends/{backend_id(holder.url)}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "backend_not_found")
        assert len(prefill) == 2 and text_of((await running.http.post(CHAT, json=chat())).json()) == expected


async def test_a_prefill_backend_is_kept_until_its_open_hand_offs_have_expired() -> None:
    settings = {"timeouts": {"handoff": 0.4, "first_token": 0.4}, "retries": {"attempts": 1}, "first_token": "decode"}
    async with pools(2, 1, **settings) as (running, _, [d]):
        d.faults.add("hang", leg="decode")
        fleet = running.gateway.fleet
        request = asyncio.create_task(running.http.post(CHAT, json=chat(stream=True)))
        await until(lambda: fleet.handoffs_pending == 1)
        [holder] = [backend for backend in fleet if backend.open_handoffs]
        fleet.remove(holder.url, "prefill")
        assert holder in fleet.pool("prefill")
        assert (await request).status_code == 504
        await until(lambda: holder not in fleet.pool("prefill"))


async def test_an_unknown_backend_is_a_404_in_the_usual_shape() -> None:
    async with pools() as (running, _, _):
        for method, path in (
            ("GET", "/admin/backends/nobody:1"),
            ("POST", "/admin/backends/nobody:1/drain"),
            ("POST", f"/admin/backends/{quote('http://nobody:1', safe='')}/undrain"),
            ("POST", "/admin/backends/ftp:%2F%2Fx/drain"),
        ):
            answer = await running.http.request(method, path)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["type"]) == (
                404,
                "backend_not_found",
                "invalid_request_error",
            )
            assert "GET /admin/backends lists them" in error["message"]


async def test_only_operators_may_list_and_drain_backends() -> None:
    async with running_gateway(["http://127.0.0.1:9"], admin_key="secret", ready=False) as running:
        for method, path in (
            ("GET", "/admin/backends"),
            ("GET", "/admin/backends/127.0.0.1:9"),
            ("POST", "/admin/backends/127.0.0.1:9/drain"),
            ("POST", "/admin/backends/127.0.0.1:9/undrain"),
        ):
            assert (await running.http.request(method, path)).status_code == 401, path
            right = {"authorization": "Bearer secret"}
            assert (await running.http.request(method, path, headers=right)).status_code == 200, path
