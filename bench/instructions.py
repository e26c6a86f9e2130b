"""How many instructions a short request costs in user space: the same number on a busy machine as on an idle one.

A P/D request with a 1 kB prompt and a streamed answer of two tokens, through the whole gateway in one process, with
transports that write nothing in place of sockets; valgrind's cachegrind counts. What the kernel does is not in it, so
it is no measure of what a gateway costs, but it tells two versions apart where CPU time does not. Needs valgrind.

  .venv/bin/python -m bench.instructions [resume=off ...]      settings of the gateway
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any, cast

import uvloop
from uvicorn.server import ServerState

from bench.process import BenchError
from proxy.app import build
from proxy.process import uvicorn_config
from proxy.relay.http1 import Connection, Origin
from proxy.relay.server import GatewayProtocol
from proxy.settings import build_settings

FEW, MANY = 200, 1200
_COUNTED = "COUNTED_REQUESTS"
_REFS = re.compile(r"I\s+refs:\s+([\d,]+)")

_BODY = b'{"model":"m","messages":[{"role":"user","content":"%b"}],"stream":true,"max_tokens":2}' % (b"x" * 1000)
_REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
_PREFILLED = (
    b'{"id":"x","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"x"},'
    b'"finish_reason":"length"}],"usage":{"prompt_tokens":256,"total_tokens":257,"completion_tokens":1},'
    b'"kv_transfer_params":{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[1,2,3,4]],'
    b'"remote_engine_id":"e","remote_request_id":"r","remote_host":"127.0.0.1","remote_port":5600,"tp_size":1}}'
)
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_HEAD = b'{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":['


def _event(data: bytes) -> bytes:
    return b"%x\r\ndata: %b\n\n\r\n" % (len(data) + 8, data)


@cache
def _streamed(with_ids: bool) -> list[bytes]:
    """Decode's answer, read by read."""
    ids = [b',"token_ids":[%d]' % token if with_ids else b"" for token in (300, 301)]
    prompt = b',"prompt_token_ids":[%b]' % b",".join(b"%d" % token for token in range(256)) if with_ids else b""
    role = b'%b{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]%b}'
    token = b'%b{"index":0,"delta":{"content":" tok"},"logprobs":null,"finish_reason":%b%b}]}'
    first = token % (_HEAD, b"null", ids[0])
    second = token % (_HEAD, b'"length"', ids[1])
    usage = _HEAD + b'],"usage":{"prompt_tokens":256,"total_tokens":258,"completion_tokens":2}}'
    return [
        _STREAM + _event(role % (_HEAD, prompt)) + _event(first),
        _event(second) + _event(usage) + _event(b"[DONE]") + b"0\r\n\r\n",
    ]


_WHOLE = [_ANSWER % (len(_PREFILLED), _PREFILLED)]


class _Transport(asyncio.Transport):
    """A socket that is always there and always ready."""

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def get_write_buffer_size(self) -> int:
        return 0

    def resume_reading(self) -> None: ...

    def pause_reading(self) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


class _Engine(_Transport):
    """The engine's end: answers each request in the next turns of the loop."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._protocol = protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast(asyncio.Protocol, protocol)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        data = bytes(data)
        prefill = b'"do_remote_decode":true' in data
        self._deliver(_WHOLE if prefill else _streamed(b"return_token_ids" in data))

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(list_of_data))

    def _deliver(self, reads: list[bytes]) -> None:
        if reads:
            asyncio.get_running_loop().call_soon(self._next, reads)

    def _next(self, reads: list[bytes]) -> None:
        self._protocol.data_received(reads[0])
        self._deliver(reads[1:])


class _Client(_Transport):
    """The client's end: knows when its answer is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if bytes(data[-5:]) == b"0\r\n\r\n":
            self.whole.set_result(None)


async def _connect(origin: Origin, kind: type[Connection], patience: float) -> Connection:
    connection = kind(origin)
    connection.connection_made(_Engine(connection))
    return connection


async def serve(requests: int, flags: list[str]) -> None:
    """Serve so many requests, one after the other."""
    backends = {"prefill": ["http://127.0.0.1:1"], "decode": ["http://127.0.0.1:2"], "warmup": False}
    gateway = build(build_settings(backends | dict(flag.split("=", 1) for flag in flags), {}))
    for backend in gateway.fleet:
        backend.models = {"m": {"id": "m"}}  # as its first probe would have found
        gateway.fleet.bring_in(backend)
    Origin.connect = _connect  # type: ignore[method-assign, assignment]
    config = uvicorn_config(gateway.surface)
    config.load()
    protocol = GatewayProtocol(config=config, server_state=ServerState(), app_state={})
    client = _Client()
    protocol.connection_made(client)
    for _ in range(requests):
        client.whole = asyncio.get_running_loop().create_future()
        protocol.data_received(_REQUEST)
        await client.whole


def count(requests: int, flags: list[str]) -> int:
    """Instructions of a process that serves so many requests and ends."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise BenchError("valgrind is missing; apt-get install valgrind")
    command = [valgrind, "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    done = subprocess.run(
        [*command, sys.executable, "-m", "bench.instructions", *flags],
        env={**os.environ, _COUNTED: str(requests), "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    found = _REFS.search(done.stderr)
    if done.returncode or found is None:
        raise BenchError(f"valgrind ended with {done.returncode}: {done.stderr[-2000:]}")
    return int(found[1].replace(",", ""))


def main(flags: list[str]) -> int:
    if requests := os.environ.get(_COUNTED):
        uvloop.run(serve(int(requests), flags))
        return 0
    try:
        each = (count(MANY, flags) - count(FEW, flags)) / (MANY - FEW)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{each / 1000:.0f} thousand instructions a request")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
