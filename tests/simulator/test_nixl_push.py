"""How the simulated NixlPushConnector treats legs that are sent by hand, without a gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pd_proxy_simulator import Simulator

from tests.support import simulators

from .helpers import PREFILL, Client, greedy, text_of_one

PATH = "/v1/completions"


def decode_params(p: Simulator, **more: Any) -> dict[str, Any]:
    """The parameters of a decode leg that is sent together with its prefill leg."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": p.engine.id,
        "remote_request_id": "any",
        "remote_host": "127.0.0.1",
        "remote_port": p.side_port,
        "tp_size": 1,
        **more,
    }


def leg(params: dict[str, Any], **more: Any) -> dict[str, Any]:
    return greedy(kv_transfer_params=params, **more)


@pytest.mark.parametrize("first", ["prefill", "decode"])
async def test_legs_with_one_id_are_paired_in_either_order(client: Client, first: str) -> None:
    async with simulators("prefill", "decode", connector="nixl_push") as [p, d]:
        legs = {
            "prefill": lambda: client.post(p, PATH, leg(PREFILL, max_tokens=1), **{"x-request-id": "one"}),
            "decode": lambda: client.post(d, PATH, leg(decode_params(p)), **{"x-request-id": "one"}),
        }
        running = [asyncio.create_task(legs.pop(first)())]
        if first == "decode":
            await d.wait_for(lambda: d.engine.loading == 1)
        else:
            await running[0]
        running.append(asyncio.create_task(legs.popitem()[1]()))
        answers = await asyncio.gather(*running)
        texts = {answer.json()["choices"][0]["text"] for answer in answers}
        assert await text_of_one(client) in texts
        assert d.engine.pulls == 1
        await p.wait_for(lambda: p.engine.used_blocks == 0)


async def test_prefills_parameters_can_be_sent_to_decode_unchanged(client: Client) -> None:
    async with simulators("prefill", "decode", connector="nixl_push") as [p, d]:
        name = {"x-request-id": "one"}
        params = (await client.post(p, PATH, leg(PREFILL, max_tokens=1), **name)).json()["kv_transfer_params"]
        assert params["transfer_mode"] == "push"
        answer = await client.post(d, PATH, leg(params), **name)
        assert answer.json()["choices"][0]["text"] == await text_of_one(client)
        assert d.engine.pulls == 1


async def test_legs_with_two_ids_are_never_paired(client: Client) -> None:
    async with simulators("prefill", "decode", connector="nixl_push", lease=0.3) as [p, d]:
        await client.post(p, PATH, leg(PREFILL, max_tokens=1), **{"x-request-id": "one"})
        answer = await client.post(d, PATH, leg(decode_params(p)), **{"x-request-id": "two"})
        assert answer.status_code == 500
        await p.wait_for(lambda: p.engine.expired == 1)


@pytest.mark.parametrize("missing", ["remote_engine_id", "remote_host", "remote_port", "tp_size", "remote_request_id"])
async def test_a_missing_member_kills_the_engine(client: Client, missing: str) -> None:
    async with simulators("prefill", "decode", connector="nixl_push") as [p, d]:
        params = decode_params(p)
        del params[missing]
        answer = await client.post(d, PATH, leg(params))
        assert answer.status_code == 500
        assert d.engine.dead is not None and missing in d.engine.dead


async def test_decode_does_not_register_at_another_engine_at_the_same_address(client: Client) -> None:
    async with simulators("prefill", "decode", connector="nixl_push") as [p, d]:
        answer = await client.post(d, PATH, leg(decode_params(p, remote_engine_id="another")))
        assert answer.status_code == 500
        assert d.engine.dead is None


async def test_a_refused_decode_leg_does_not_notify_prefill(client: Client) -> None:
    async with simulators("prefill", "decode", connector="nixl_push", lease=0.3) as [p, d]:
        name = {"x-request-id": "one"}
        params = (await client.post(p, PATH, leg(PREFILL, max_tokens=1), **name)).json()["kv_transfer_params"]
        assert (await client.post(d, PATH, leg(params, min_tokens=99), **name)).status_code == 400
        await p.wait_for(lambda: p.engine.expired == 1)
