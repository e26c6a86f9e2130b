"""How many instructions a request or a token costs in user space: the same number on a busy machine as on an idle one.

P/D requests with streamed answers pass through the whole gateway in one process, with transports that write nothing in
place of sockets; valgrind's cachegrind counts. The kernel's work is not included, so the number is no measure of a
gateway's cost, but it shows differences between two versions that CPU time does not. Needs valgrind.

    .venv/bin/python -m bench.instructions [short|long|paced|flood|big] [engines=8] [resume=off policy.prefill=prefix
        ...]

engines: of each pool (1); the others are settings of the gateway.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import uvloop
from pd_proxy.app import build
from pd_proxy.fleet.health.kv_cache import Cache
from pd_proxy.http.connection import Connection
from pd_proxy.http.origin import Origin
from pd_proxy.http.server import GatewayProtocol
from pd_proxy.process import uvicorn_config
from pd_proxy.settings.tree import build_settings
from uvicorn.server import ServerState

from bench.process import BenchError

_COUNTED = "COUNTED_REQUESTS"
_CLOCK_STEP = 20e-6  # seconds; a request looks some 40 times
_PACKAGE = "pd_proxy."
_REFS = re.compile(r"I\s+refs:\s+([\d,]+)")


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of request.

    Attributes:
        requests: the difference between the two runs in requests.
        more: tokens beyond two in an answer; if there are any, tokens are counted instead of requests.
        together: tokens in one read.
        pad: bytes that are added to a token's text.
        prompt: bytes.
    """

    requests: int = 1000
    more: int = 0
    together: int = 1
    pad: int = 0
    prompt: int = 1000


CASES = {
    "short": Case(),
    "long": Case(requests=100, prompt=400_000),
    "paced": Case(requests=40, more=200),
    "flood": Case(requests=40, more=200, together=20),
    "big": Case(requests=40, more=200, pad=800),
}
_BODY = b'{"model":"m","messages":[{"role":"user","content":"%b"}],"stream":true,"max_tokens":%d}'
_REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b"
_READ = 256 * 1024  # the most that uvloop reads from a socket at a time
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
def _streamed(case: Case, with_ids: bool) -> list[bytes]:
    """Decode's answer, read by read."""
    ids = [b',"token_ids":[%d]' % token if with_ids else b"" for token in range(300, 302 + case.more)]
    prompt = b',"prompt_token_ids":[%b]' % b",".join(b"%d" % token for token in range(256)) if with_ids else b""
    role = b'%b{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]%b}'
    token = b'%b{"index":0,"delta":{"content":" tok%b"},"logprobs":null,"finish_reason":%b%b}]}'
    first, *more = [_event(token % (_HEAD, b"y" * case.pad, b"null", its)) for its in ids[:-1]]
    last = _event(token % (_HEAD, b"y" * case.pad, b'"length"', ids[-1]))
    usage = _event(_HEAD + b'],"usage":{"prompt_tokens":256,"total_tokens":258,"completion_tokens":2}}')
    return [
        _STREAM + _event(role % (_HEAD, prompt)) + first,
        *[b"".join(more[start : start + case.together]) for start in range(0, case.more, case.together)],
        last + usage + _event(b"[DONE]") + b"0\r\n\r\n",
    ]


_WHOLE = [_ANSWER % (len(_PREFILLED), _PREFILLED)]


class _Transport(asyncio.Transport):
    """A socket that is always open and always writable."""

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
    """The engine's side: answers each request in the next turns of the event loop."""

    def __init__(self, protocol: asyncio.Protocol, case: Case) -> None:
        super().__init__()
        self._protocol = protocol
        self._case = case

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast(asyncio.Protocol, protocol)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        data = bytes(data)
        prefill = b'"do_remote_decode":true' in data
        self._deliver(iter(_WHOLE if prefill else _streamed(self._case, b"return_token_ids" in data)))

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(list_of_data))

    def _deliver(self, reads: Iterator[bytes]) -> None:
        if data := next(reads, None):
            asyncio.get_running_loop().call_soon(self._next, data, reads)

    def _next(self, data: bytes, reads: Iterator[bytes]) -> None:
        self._protocol.data_received(data)
        self._deliver(reads)


class _Client(_Transport):
    """The client's side: detects the end of its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if bytes(data[-5:]) == b"0\r\n\r\n":
            self.whole.set_result(None)


class _Clock:
    """A clock that moves by the same step at each look.

    Placement learns from how long engines take. With the machine's clock it learnt something else in each run, which
    changed a request's number by one per cent.
    """

    def __init__(self) -> None:
        self._now = 1000.0

    def __call__(self) -> float:
        self._now += _CLOCK_STEP
        return self._now

    def install(self) -> None:
        """Put it where the gateway's modules have `time.monotonic`."""
        for name, module in list(sys.modules.items()):
            if name.startswith(_PACKAGE) and getattr(module, "monotonic", None) is time.monotonic:
                module.monotonic = self  # type: ignore[attr-defined]


async def serve(case: Case, requests: int, flags: list[str]) -> None:
    """Serve this many requests, one after the other."""

    async def connect(origin: Origin, kind: type[Connection], timeout: float) -> Connection:
        connection = kind(origin)
        connection.connection_made(_Engine(connection, case))
        return connection

    _Clock().install()
    given: dict[str, Any] = {"warmup": False}
    engines = 1
    for name, _, value in (flag.partition("=") for flag in flags):
        *groups, leaf = name.split(".")
        if name == "engines":
            engines = int(value)
            continue
        inner = given
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[leaf] = value
    for role, first in (("prefill", 1), ("decode", 2)):
        given[role] = [f"http://127.0.0.1:{first + 2 * number}" for number in range(engines)]
    gateway = build(build_settings(given, {}))
    for backend in gateway.fleet:
        backend.models = {"m": {"id": "m"}}  # as its first probe would have found
        gateway.fleet.set_cache(backend, Cache(tokens=1 << 20, caching=True))
        gateway.fleet.bring_in(backend)
    Origin.connect = connect  # type: ignore[method-assign, assignment]
    config = uvicorn_config(gateway.surface)
    config.load()
    protocol = GatewayProtocol(config=config, server_state=ServerState(), app_state={})
    client = _Client()
    protocol.connection_made(client)
    body = _BODY % (b"x" * case.prompt, 2 + case.more)
    request = _REQUEST % (len(body), body)
    for _ in range(requests):
        client.whole = asyncio.get_running_loop().create_future()
        for start in range(0, len(request), _READ):
            protocol.data_received(request[start : start + _READ])
        await client.whole


def count(name: str, more: int, requests: int, flags: list[str]) -> int:
    """Instructions of a process that serves this many requests and ends."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise BenchError("valgrind is not installed: apt-get install valgrind")
    command = [valgrind, "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    done = subprocess.run(
        [*command, sys.executable, "-m", "bench.instructions", name, *flags],
        env={**os.environ, _COUNTED: f"{requests} {more}", "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    found = _REFS.search(done.stderr)
    if done.returncode or found is None:
        raise BenchError(f"valgrind ended with {done.returncode}: {done.stderr[-2000:]}")
    return int(found[1].replace(",", ""))


def main(arguments: list[str]) -> int:
    name, flags = (arguments[0], arguments[1:]) if arguments and arguments[0] in CASES else ("short", arguments)
    case = CASES[name]
    if counted := os.environ.get(_COUNTED):
        requests, more = map(int, counted.split())
        uvloop.run(serve(replace(case, more=more), requests, flags))
        return 0
    try:
        if case.more:  # the cost of more tokens in the same number of requests
            spent = count(name, case.more, case.requests, flags) - count(name, 0, case.requests, flags)
            each = spent / case.requests / case.more
        else:
            few = case.requests // 5
            each = (count(name, 0, few + case.requests, flags) - count(name, 0, few, flags)) / case.requests
    except BenchError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{name}: {each / 1000:.1f} thousand instructions a {'token' if case.more else 'request'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
