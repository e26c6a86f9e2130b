"""Every inner name of uvicorn that the gateway uses: uvicorn does not promise to keep them.

`pyproject.toml` allows one minor version. Where this fails with a newer one, `docs/architecture.md` says what rests on
the name.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from pathlib import Path

import pytest
import uvicorn
from uvicorn.protocols.http import flow_control, httptools_impl
from uvicorn.server import Server, ServerState

ROOT = Path(__file__).parents[2]

MODULE = ("STATUS_LINE", "HttpToolsProtocol", "RequestResponseCycle")
PROTOCOL_METHODS = (
    *(
        "connection_made",
        "connection_lost",
        "on_message_begin",
        "on_url",
        "on_header",
        "on_headers_complete",
        "on_body",
    ),
    *("on_message_complete", "on_response_complete", "pause_writing", "resume_writing", "timeout_keep_alive_handler"),
    *("_start_asgi_task", "_unset_keepalive_if_required", "shutdown"),
)
PROTOCOL_ATTRIBUTES = (
    *("app", "client", "config", "cycle", "expect_100_continue", "flow", "headers", "loop", "parser", "pipeline"),
    *("scope", "server_state", "timeout_keep_alive", "transport", "logger", "access_logger"),
)
CYCLE = (
    *("scope", "body", "more_body", "message_event", "disconnected", "default_headers", "keep_alive", "flow"),
    *("waiting_for_100_continue", "response_started", "response_complete", "on_response"),
)
CYCLE_ARGUMENTS = [
    *("self", "scope", "transport", "flow", "logger", "access_logger", "access_log", "default_headers"),
    *("message_event", "expect_100_continue", "keep_alive", "on_response"),
]
"""In this order: the gateway gives them by their places."""


async def app(scope: object, receive: object, send: object) -> None: ...


@pytest.fixture
async def protocol() -> httptools_impl.HttpToolsProtocol:
    config = uvicorn.Config(app)  # type: ignore[arg-type]
    config.load()
    made = httptools_impl.HttpToolsProtocol(config=config, server_state=ServerState(), app_state={})
    made.connection_made(asyncio.Transport())  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("name", MODULE)
def test_the_module_has_it(name: str) -> None:
    assert hasattr(httptools_impl, name)
    assert flow_control.HIGH_WATER_LIMIT > 0


@pytest.mark.parametrize("name", [*PROTOCOL_METHODS, *PROTOCOL_ATTRIBUTES])
async def test_the_protocol_has_it(protocol: httptools_impl.HttpToolsProtocol, name: str) -> None:
    assert hasattr(protocol, name)
    assert callable(getattr(protocol, name)) is (name in PROTOCOL_METHODS or name == "app")


async def test_the_protocol_keeps_the_target_of_a_request(protocol: httptools_impl.HttpToolsProtocol) -> None:
    protocol.on_message_begin()
    protocol.on_url(b"/path")
    assert protocol.url == b"/path"


async def test_the_flow_has_what_is_replaced_and_read(protocol: httptools_impl.HttpToolsProtocol) -> None:
    assert isinstance(protocol.flow._is_writable_event, asyncio.Event)
    assert protocol.flow.write_paused is False
    assert callable(protocol.flow.pause_reading)
    assert callable(protocol.flow.resume_reading)


def test_the_cycle_takes_its_arguments_in_this_order() -> None:
    assert list(inspect.signature(httptools_impl.RequestResponseCycle.__init__).parameters) == CYCLE_ARGUMENTS


@pytest.mark.parametrize("name", CYCLE)
def test_the_cycle_has_it(name: str) -> None:
    source = inspect.getsource(httptools_impl.RequestResponseCycle.__init__)
    assert re.search(rf"self\.{name}\b", source)


@pytest.mark.parametrize("name", ["startup", "capture_signals"])
def test_the_server_has_it(name: str) -> None:
    assert callable(getattr(Server, name))


def test_the_servers_state_has_it() -> None:
    state = ServerState()
    assert {"connections", "tasks", "total_requests", "default_headers"} <= vars(state).keys()


def test_the_servers_configuration_has_it() -> None:
    config = uvicorn.Config(app)  # type: ignore[arg-type]
    config.load()
    assert callable(config.http_protocol_class)
    assert callable(config.loaded_app)


def test_one_minor_version_is_allowed() -> None:
    """Names have gone or changed their meaning between minor versions."""
    assert re.search(r'"uvicorn>=0\.(\d+),<0\.(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
