from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import httpx
import pytest
from pd_proxy_simulator import Simulator, SimulatorConfig
from pd_proxy_simulator.sidechannel import SideChannelServer, frame

from .helpers import Client, Start, chat, greedy


async def test_kill_cuts_streams_and_refuses_connections(start: Start, client: Client) -> None:
    sim = await start(step_time=0.01)
    stream = client.events(sim, "/v1/completions", greedy(max_tokens=1000))
    await anext(stream)
    sim.kill()
    with pytest.raises(httpx.TransportError):
        async for _ in stream:
            pass
    with pytest.raises(httpx.ConnectError):
        await client.get(sim, "/health")


async def test_kill_is_a_reset_to_peers(start: Start) -> None:
    sim = await start()
    reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
    await sim.wait_for(lambda: len(sim.connections) == 1)
    sim.kill()
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


async def test_a_connection_accepted_while_the_engine_is_killed_reads_no_blocks(start: Start) -> None:
    """The kernel has accepted the connection, the process has not; the blocks of hand-offs may hold other requests
    by then."""
    sim = await start()
    serving = sim._serving
    sim.kill()
    late = await asyncio.get_running_loop().create_server(lambda: SideChannelServer(serving), "127.0.0.1", 0)
    async with late:
        reader, writer = await asyncio.open_connection(*late.sockets[0].getsockname())
        writer.write(frame({"op": "read", "block_ids": [1]}))
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


async def test_a_restarted_simulator_has_the_same_port_and_another_engine(start: Start, client: Client) -> None:
    sim = await start()
    await client.prefill(sim)
    before = sim.port, sim.side_port, sim.engine.id
    sim.kill()
    await sim.restart()
    assert (sim.port, sim.side_port) == before[:2]
    assert sim.engine.id != before[2]
    assert sim.engine.used_blocks == sim.engine.stranded_blocks == 0
    assert await client.text(sim)


async def test_stop_lets_requests_in_flight_end(client: Client) -> None:
    sim = Simulator(SimulatorConfig(step_time=0.005))
    await sim.start()
    leg = asyncio.create_task(client.text(sim, max_tokens=10))
    await sim.wait_for(lambda: sim.engine.running == 1)
    await sim.stop(grace=5)
    assert await leg


async def test_received_requests_can_be_looked_at(mixed: Simulator, client: Client) -> None:
    body = chat(unknown_field=[1, {"a": None}])
    await client.post(mixed, "/v1/chat/completions", body, **{"X-Custom": "Value"})
    received = mixed.requests[-1]
    assert received.path == "/v1/chat/completions"
    assert received.headers["x-custom"] == "Value"
    assert received.body == body
    assert (received.status, received.aborted, received.finished, received.leg) == (200, False, True, "local")
    assert received.output_tokens == 12


async def test_the_state_can_be_read_over_http(mixed: Simulator, client: Client) -> None:
    await client.prefill(mixed)
    state = (await client.get(mixed, "/simulator/state")).json()
    assert state["requests_served"] == 1
    assert state["stranded_blocks"] == mixed.engine.stranded_blocks > 0
    assert state["handoffs"] == 1


async def test_waiting_ends_after_its_timeout(mixed: Simulator) -> None:
    with pytest.raises(TimeoutError):
        await mixed.wait_for(lambda: False, 0.01)


async def test_requests_can_be_pipelined(mixed: Simulator) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", mixed.port)
    writer.write(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n" * 40)
    for _ in range(40):
        await reader.readuntil(b'{"version":"0.32.0"}')
    writer.close()


async def test_an_idle_connection_is_closed_after_the_keep_alive_time(start: Start) -> None:
    sim = await start(keep_alive=0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
    writer.write(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (await reader.read()).endswith(b'{"version":"0.32.0"}')
    writer.close()


async def test_the_command_serves_hands_off_across_processes_and_ends_with_0(start: Start, client: Client) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pd_proxy_simulator", "--role", "prefill", "--port", "0", "--step-time", "0"),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    url = line.split()[-1]
    leg = greedy(max_tokens=1, kv_transfer_params={"do_remote_decode": True})
    params = (await client.http.post(url + "/v1/completions", json=leg)).json()["kv_transfer_params"]
    decode, mixed = await start(), await start()
    assert await client.text(decode, kv_transfer_params=params) == await client.text(mixed)
    state = json.loads((await client.http.get(url + "/simulator/state")).content)
    assert state["role"] == "prefill"
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0
