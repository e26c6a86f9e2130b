"""What a body costs depends on its bytes, whatever its shape: the time of the event loop, and memory.

A whole gateway in this process, from the bytes' arrival to the legs' last byte and the client's answer, with transports
that write nothing in the place of sockets. The measure is CPU time, the least of a few runs, against that of a body which
is one string of the same size; and the growth of the process's memory at its peak.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import process_time
from typing import Any, cast

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from proxy.app import build
from proxy.flow.single import ROUTES
from proxy.handoff.endpoints import LAYOUTS
from proxy.process import uvicorn_config
from proxy.relay.http1 import Connection, Origin
from proxy.relay.server import GatewayProtocol
from proxy.settings import build_settings

MB = 1024 * 1024
_READ = 256 * 1024
_TIMES = 4  # what a shape may cost at most, in strings of its size

_PREFILLED = (
    b'{"id":"x","choices":[{"index":0,"message":{"role":"assistant","content":"x"},"text":"x","finish_reason":"length"}],'
    b'"content":[],"output":[],"meta_info":{"prompt_tokens":1},"usage":{"prompt_tokens":1,"completion_tokens":1},'
    b'"kv_transfer_params":{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[1]],'
    b'"remote_engine_id":"e","remote_request_id":"r","remote_host":"127.0.0.1","remote_port":5600,"tp_size":1},'
    b'"ec_transfer_params":{}}'
)
_ANSWER = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
_DONE = _ANSWER % (b"200 OK", len(_PREFILLED), _PREFILLED)
_REFUSED = _ANSWER % (b"400 Bad Request", 46, b'{"error":{"message":"no","type":"t","code":1}}')


class _Transport(asyncio.Transport):
    """A socket that is always there and always ready."""

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return False

    def resume_reading(self) -> None: ...

    def pause_reading(self) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


class _Engine(_Transport):
    """The engine's end: it prefills and encodes whatever it is asked, and refuses to decode."""

    def __init__(self, protocol: asyncio.Protocol, answer: bytes, legs: list[int]) -> None:
        super().__init__()
        self._protocol = protocol
        self._answer = answer
        self._legs = legs

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast(asyncio.Protocol, protocol)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writelines((data,))

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self._legs.append(sum(map(len, list_of_data)))
        asyncio.get_running_loop().call_soon(self._protocol.data_received, self._answer)


class _Client(_Transport):
    """The client's end."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.answer.done():
            self.answer.set_result(int(bytes(data[9:12])))

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(list_of_data))


@dataclass
class Cost:
    """Attributes:
    seconds: of CPU.
    memory: bytes, beside the body's as it is sent.
    status: of the answer.
    legs: bytes of each.
    """

    seconds: float
    memory: int
    status: int
    legs: list[int]


async def _spend(path: str, body: bytes, content_type: bytes) -> Cost:
    legs: list[int] = []

    async def connect(origin: Origin, kind: type[Connection], patience: float) -> Connection:
        connection = kind(origin)
        answer = _REFUSED if str(origin.url).endswith(":2") else _DONE
        connection.connection_made(_Engine(connection, answer, legs))
        return connection

    pools: dict[str, Any] = {"prefill": ["http://127.0.0.1:1"], "decode": ["http://127.0.0.1:2"], "warmup": False}
    if path == LAYOUTS["sglang_generate"].path:
        pools |= {"kind": "sglang", "connector": "sglang"}
    else:
        pools |= {"encode": ["http://127.0.0.1:3"]}
    gateway = build(build_settings(pools | {"routes": {"generate": True}}, {}))
    for backend in gateway.fleet:
        backend.models = {"m": {"id": "m"}}
        gateway.fleet.bring_in(backend)
    config = uvicorn_config(gateway.surface)
    config.load()
    head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
    request = memoryview(head % (path.encode(), content_type, len(body)) + body)
    best = Cost(1e9, 0, 0, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Origin, "connect", connect)
        for run in range(3):
            protocol = GatewayProtocol(config=config, server_state=ServerState(), app_state={})
            client = _Client()
            protocol.connection_made(client)
            legs.clear()
            before = _resident() if run == 0 else 0
            start = process_time()
            for place in range(0, len(request), _READ):
                protocol.data_received(bytes(request[place : place + _READ]))
                await asyncio.sleep(0)
            status = await client.answer
            best.seconds = min(best.seconds, process_time() - start)
            if run == 0:
                best.memory = _peak() - before
            best.status, best.legs = status, legs.copy()
            protocol.connection_lost(None)
            await asyncio.sleep(0)
    return best


def cost(path: str, body: bytes, content_type: bytes = b"application/json") -> Cost:
    gc.collect()
    return uvloop.run(_spend(path, body, content_type))


_STATUS = Path("/proc/self/status")


def _resident() -> int:
    """Bytes that this process has in memory, once what is free is given back; the peak is counted from here."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


@cache
def string(size: int) -> float:
    """What a body costs that is one string."""
    body = b'{"model":"m","messages":[{"role":"user","content":"' + b"x" * size + b'"}]}'
    return min(cost("/v1/chat/completions", body).seconds for _ in range(2))
