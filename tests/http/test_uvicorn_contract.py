"""What of uvicorn the gateway rests on: the contract of an `http` class, and what `process.py` replaces.

uvicorn's documentation names `Config(http=...)` and says little of what such a class must do. These tests fail first
where an update changes it.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
import uvicorn
from pd_proxy.http.server import GatewayProtocol
from uvicorn.server import Server, ServerState

from .serving import Server as Served
from .serving import request, serving


async def app(scope: object, receive: object, send: object) -> None: ...


def test_the_configuration_takes_our_class_and_has_what_it_reads() -> None:
    config = uvicorn.Config(app, http=GatewayProtocol)  # type: ignore[arg-type]
    config.load()
    assert config.http_protocol_class is GatewayProtocol
    assert callable(config.loaded_app)
    assert config.root_path == ""
    assert config.asgi_version == "3.0"
    assert config.timeout_keep_alive > 0


def test_the_servers_state_has_what_the_protocol_keeps_there() -> None:
    state = ServerState()
    assert (state.total_requests, state.connections, state.tasks, state.default_headers) == (0, set(), set(), [])


def test_the_server_makes_protocols_with_the_arguments_that_ours_takes() -> None:
    source = inspect.getsource(Server.startup)
    given = ("config=config", "server_state=self.server_state", "app_state=self.lifespan.state", "_loop=_loop")
    assert all(argument in source for argument in given)
    assert list(inspect.signature(GatewayProtocol).parameters) == ["config", "server_state", "app_state", "_loop"]


@pytest.mark.parametrize("name", ["startup", "capture_signals", "shutdown", "serve"])
def test_the_server_has_the_methods_that_are_replaced_or_called(name: str) -> None:
    assert callable(getattr(Server, name))


async def test_the_server_puts_a_new_list_of_headers_into_its_state_each_second() -> None:
    server = uvicorn.Server(uvicorn.Config(app, server_header=False))  # type: ignore[arg-type]
    server.config.load()
    await server.on_tick(0)
    first = server.server_state.default_headers
    assert [name for name, _ in first] == [b"date"]
    await server.on_tick(10)
    assert server.server_state.default_headers is not first


async def test_the_server_ends_what_the_protocol_registers() -> None:
    """Connections are shut down, and the tasks of requests are waited for."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, client: Any, receive: Any) -> None:
        begun.set()
        await go_on.wait()
        client.respond(200, [], b"ok")

    async with serving() as server:
        server.app = slow
        asking = asyncio.create_task(Served.say(server, request()))
        await begun.wait()
        [connection] = server.connections
        assert len(connection.server_state.tasks) == 1
        connection.shutdown()
        go_on.set()
        answer = await asking
        assert b"connection: close" in answer and answer.endswith(b"ok")
        assert not connection.server_state.tasks and not connection.server_state.connections
