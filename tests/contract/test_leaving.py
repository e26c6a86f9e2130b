"""Clients disconnect at any moment, and engines fail meanwhile: nothing of their requests is left, whatever the
connector."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from random import Random

import pytest

from tests.contract.cases import CASES, Case, fleet
from tests.support import Running, chat, until

_TIMEOUT = (0.0, 0.003, 0.01, 0.03, 0.1, 10.0)  # seconds until a client disconnects


async def ask(running: Running, random: Random, topic: int) -> None:
    body = chat(
        "word " * random.choice((10, 400, 800)) + str(topic % 7),
        max_tokens=random.choice((1, 8, 40)),
        stream=random.random() < 0.6,
    )
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    with suppress(TimeoutError):
        async with asyncio.timeout(random.choice(_TIMEOUT)):
            await reader.read()
    writer.close()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_nothing_is_left_of_clients_that_leave_while_engines_fail(case: Case) -> None:
    random = Random(case.name)
    engine = {"prefill_rate": 20_000.0, "step_time": 0.002}
    async with fleet(case, prefill=2, decode=2, engine=engine) as (running, prefill, decode):
        for failing in (False, True):
            if failing:
                for one in (prefill[0], decode[0]):
                    for kind in ("reset", "die_mid_stream", "drop_handoff_params", "garbage"):
                        one.faults.add(kind, count=3)
            await asyncio.gather(*(ask(running, random, topic) for topic in range(20)))
        await until(running.idle)
