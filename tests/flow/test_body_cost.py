"""The cost of a body, in time of the event loop and in memory, depends on its size and not on its shape.

A gateway on real sockets, with engines and clients in other threads. What is counted is the CPU time of the event
loop's thread from a body's first byte to the answer, the least of a few runs, against that of a body which is one
string of the same size; and by how much the process has grown at its peak.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import re
import socket
import socketserver
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from threading import Thread
from time import thread_time
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support import running_gateway

MB = 1024 * 1024
TIMES = 4  # the time that a shape may take, in strings of its size
HAS_PEAK = Path("/proc/self/clear_refs").exists()

_PREFILLED = (
    b'{"id":"x","choices":[{"index":0,"message":{"role":"assistant","content":"x"},"text":"x","finish_reason":"length"}],'
    b'"content":[],"stop_reason":"max_tokens","output":[],"status":"completed","usage":{"prompt_tokens":1,"completion_tokens":1},"ec_transfer_params":{},'
    b'"kv_transfer_params":{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[1]],'
    b'"remote_engine_id":"e","remote_request_id":"r","remote_host":"127.0.0.1","remote_port":5600,"tp_size":1}}'
)
_MODELS = b'{"object":"list","data":[{"id":"m","object":"model"}]}'
_REFUSAL = b'{"error":{"message":"no","type":"t","code":400}}'


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, status: bytes, answer: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Engine)
        self.status = status
        self.answer = answer
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Engine(socketserver.StreamRequestHandler):
    """An engine that takes whatever it is asked, and answers always alike."""

    server: _Server

    def handle(self) -> None:
        while (line := self.rfile.readline()) not in (b"", b"\r\n"):
            headers = dict[bytes, bytes]()
            while (header := self.rfile.readline()) not in (b"", b"\r\n"):
                name, _, value = header.partition(b":")
                headers[name.lower()] = value.strip()
            left = int(headers.get(b"content-length", b"0"))
            while left > 0 and (data := self.rfile.read(min(left, MB))):
                left -= len(data)
            if b"chunked" in headers.get(b"transfer-encoding", b""):
                while size := int(self.rfile.readline(), 16):
                    self.rfile.read(size + 2)
                self.rfile.readline()
            status, answer = (
                (b"200 OK", _MODELS) if line.startswith(b"GET") else (self.server.status, self.server.answer)
            )
            head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (
                status,
                len(answer),
            )
            self.wfile.write(head + answer)


class Bed:
    """A gateway, and what bodies cost it. Its settings are those of a kind of fleet."""

    def __init__(self, **more: Any) -> None:
        self._more = more
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)  # as the gateway has it
        self._stack = AsyncExitStack()
        self._strings: dict[int, float] = {}
        self._servers = [_Server(b"200 OK", _PREFILLED), _Server(b"400 Bad Request", _REFUSAL)]
        self.port = self._runner.run(self._open())

    async def _open(self) -> int:
        prefill, decode = self._servers
        more = self._more
        if more.pop("encodes", False):
            more["encode"] = [(encoder := _Server(b"200 OK", _PREFILLED)).url]
            self._servers.append(encoder)
        known = (
            "kind" not in more
        )  # these engines answer the probes of vLLM's alone; others may get a 503 once it was read
        gateway = running_gateway([prefill.url], [decode.url], routes={"generate": True}, ready=known, **more)
        return (await self._stack.enter_async_context(gateway)).port

    def close(self) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def spend(self, path: str, body: bytes, content_type: str = "application/json", runs: int = 2) -> tuple[float, int]:
        """Seconds of the event loop and bytes of memory that a body costs."""
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: {content_type}\r\n"
        data = f"{head}content-length: {len(body)}\r\n\r\n".encode()
        seconds, memory = [], []
        for _ in range(runs):
            gc.collect()
            before = _resident()
            seconds.append(self._runner.run(self._send(data, body)))
            memory.append(_peak() - before)
        return min(seconds), min(memory)

    async def _send(self, head: bytes, body: bytes) -> float:
        start = thread_time()
        status = await asyncio.to_thread(self._ask, head, body)
        assert status < 500 or status in (502, 503), status
        return thread_time() - start

    def _ask(self, head: bytes, body: bytes) -> int:
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            client.sendall(head)
            client.sendall(body)
            answer = b""
            while data := client.recv(MB):
                answer = answer or data
        return int(answer[9:12])

    def string(self, size: int) -> float:
        """What a string of a size costs."""
        if size not in self._strings:
            part = b'{"type":"image_url","image_url":{"url":"http://x/a"}},' if "encode" in self._more else b""
            body = b'{"model":"m","messages":[{"role":"user","content":[%b{"type":"text","text":"%b"}]}]}'
            self._strings[size] = self.spend(CHAT, body % (part, b"x" * size), runs=4)[0]
        return self._strings[size]

    def check(self, path: str, body: bytes, content_type: str = "application/json") -> None:
        """A body costs no more than it may."""
        seconds, memory = self.spend(path, body, content_type)
        most_seconds, most_memory = TIMES * self.string(len(body) // MB * MB), 3 * len(body) + 32 * MB
        if seconds > most_seconds or memory > most_memory:
            # The process has other things to do now and then: what a body itself costs, it costs each time.
            again = self.spend(path, body, content_type, runs=3)
            seconds, memory = min(seconds, again[0]), min(memory, again[1])
        what = f"{path}: {body[:80]!r}…"
        assert seconds <= most_seconds, what
        if HAS_PEAK:
            assert memory <= most_memory, f"{memory / MB:.0f} MB: {what}"


def _resident() -> int:
    """Bytes of this process that are in memory once what is free is given back. The peak is counted from here."""
    if not HAS_PEAK:
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM") if HAS_PEAK else 0


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.fixture(scope="module")
def beds() -> Iterator[Callable[[str], Bed]]:
    made: dict[str, Bed] = {}

    def bed(kind: str) -> Bed:
        if kind not in made:
            made[kind] = Bed(**KINDS[kind])
        return made[kind]

    yield bed
    for one in made.values():
        one.close()


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "encodes": {"encodes": True},
    "sglang": {"kind": "sglang", "connector": "sglang"},
}
CHAT = "/v1/chat/completions"

# Where something long can be: the kind of fleet, the route, and the text before and behind it.
PLACES = [
    ("plain", CHAT, '{"model":"m","messages":[{"role":"user","content":[]},', "]}"),
    ("plain", CHAT, '{"model":"m","me\\u0073sages":[{"role":"user","content":[', "]}]}"),
    ("encodes", CHAT, '{"model":"m","messages":[{"role":"user","content":[]},', "]}"),
    ("encodes", CHAT, '{"model":"m","messages":[{"role":"user","content":[', "]}]}"),
    ("plain", CHAT, '{"model":"m","messages":[],"vllm_xargs":{"a":[', "]}}"),
    ("plain", CHAT, '{"model":"m","messages":[],"stream_options":{"a":[', "]}}"),
    ("plain", CHAT, '{"model":"m","messages":[],"stop":[', "]}"),
    ("plain", CHAT, '{"model":"m","messages":[],"unknown":[', "]}"),
    ("plain", CHAT, '{"model":[', "]}"),
    ("plain", CHAT, "[", "]"),
    ("plain", "/v1/completions", '{"model":"m","prompt":[', "]}"),
    ("plain", "/v1/messages", '{"model":"m","max_tokens":1,"messages":[{"role":"user","content":[', "]}]}"),
    ("plain", "/v1/messages", '{"model":"m","max_tokens":1,"messages":[{"role":"user","content":[]}],"system":[', "]}"),
    ("plain", "/v1/messages", '{"model":"m","messages":[],"tool_choice":{"type":[', "]}}"),
    ("plain", "/v1/responses", '{"model":"m","input":[{"content":[]},', "]}"),
    ("plain", "/v1/responses", '{"model":"m","input":"a","tools":[', "]}"),
    ("plain", "/inference/v1/generate", '{"model":"m","token_ids":[', "]}"),
    ("plain", "/inference/v1/generate", '{"model":"m","token_ids":[1],"sampling_params":{"a":[', "]}}"),
    ("sglang", "/generate", '{"text":[', "]}"),
    ("sglang", "/generate", '{"input_ids":[[1],', "]}"),
    ("sglang", "/generate", '{"input_embeds":[[[1]],', "]}"),
    ("sglang", "/generate", '{"text":"a","sampling_params":[', "]}"),
    ("plain", "/v1/embeddings", '{"model":"m","input":[', "]}"),
    ("plain", "/tokenize", '{"model":"m","messages":[', "]}"),
    (
        "plain",
        "/v1/audio/transcriptions",
        '--b\r\ncontent-disposition: form-data; name="vllm_xargs"\r\n\r\n[',
        "]\r\n--b--\r\n",
    ),
    (
        "plain",
        "/v1/audio/transcriptions",
        '--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n',
        "\r\n--b--\r\n",
    ),
]
UNITS = [
    *("{}", "[]", '""', "1", "null", "[[]]", '{"a":1}', '"\\""', '"\\u0061"', '{"role":"user","content":"x"}'),
    *(
        '{"role":"user","content":[]}',
        '{"type":"text","text":"x"}',
        '{"type":"image_url","image_url":{"url":"data:a"}}',
    ),
    *(
        '{"type":"image_url","image_url":";base64,"}',
        '{"content":[{}]}',
        '{"type":"function"}',
        '{"kv_transfer_params":1}',
    ),
]


def filled(place: tuple[str, str, str, str], shape: str, unit: str, size: int) -> bytes:
    """A body of a size with a shape of units at a place."""
    _, _, before, behind = place
    match shape:
        case "wide":
            inner = ",".join([unit] * (size // (len(unit) + 1)))
        case "blank":
            inner = unit + " " * size + "," + unit
        case "deep":
            depth = 200
            inner = '{"type":"tool_result","content":[' * depth + '"' + "x" * size + '",' + unit + "]}" * depth
        case "deep and wide":
            depth = 100
            inner = (
                '{"type":"tool_result","content":[' * depth
                + ",".join([unit] * (size // (len(unit) + 1)))
                + "]}" * depth
            )
        case "without end":
            inner = "[" * size
        case "members":
            inner = "{" + ",".join(f'"{number:x}":{unit}' for number in range(size // (len(unit) + 9))) + "}"
        case "one name":
            inner = "{" + ",".join([f'"type":{unit}'] * (size // (len(unit) + 8))) + "}"
        case "escaped":
            inner = '"' + "\\u0041" * (size // 6) + '",' + unit
        case _:
            inner = '"' + "\U0001f600" * (size // 4) + '",' + unit
    return (before + inner + behind).encode()


SHAPES = ["wide", "blank", "deep", "deep and wide", "without end", "members", "one name", "escaped", "astral"]
SMALL_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "content", "a"]), inner, max_size=2)
    ),
    max_leaves=4,
)
CASES = st.tuples(
    st.sampled_from(PLACES), st.sampled_from(SHAPES), st.sampled_from(UNITS) | SMALL_VALUES.map(json.dumps)
)


ALONE = "MEMORY_TEST_ALONE"  # no variable of the gateway's, which the tests run without


def alone_in_a_process(test: str) -> None:
    """Run a test in a process of its own: what other tests leave in memory is in the peak that is measured."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:schemathesis", "-p", "no:xdist", f"{__file__}::{test}"]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env={**os.environ, ALONE: "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def check(bed: Bed, place: tuple[str, str, str, str], shape: str, unit: str, size: int) -> None:
    form = "multipart/form-data; boundary=b" if "audio" in place[1] else "application/json"
    bed.check(place[1], filled(place, shape, unit, size), form)


@pytest.mark.slow
@pytest.mark.parametrize("size", [4 * MB, 16 * MB])
def test_no_shape_costs_more_than_four_strings_of_its_size(beds: Callable[[str], Bed], size: int) -> None:
    if ALONE not in os.environ:
        alone_in_a_process(f"test_no_shape_costs_more_than_four_strings_of_its_size[{size}]")
        return

    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(CASES)
    def holds(case: tuple[tuple[str, str, str, str], str, str]) -> None:
        place, shape, unit = case
        check(beds(place[0]), place, shape, unit, size)

    holds()


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS[::4])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[1]}{place[2][-24:]}")
def test_no_list_costs_more_than_four_strings_of_its_size(
    beds: Callable[[str], Bed], place: tuple[str, str, str, str], unit: str
) -> None:
    check(beds(place[0]), place, "wide", unit, 4 * MB)


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        "{" + ",".join(f'"{number:x}":1' for number in range(4 * MB // 9)) + "}",
        "{" + ",".join(['"n":1'] * (4 * MB // 6)) + "}",
        "{" + ",".join(['"messages":[]'] * (4 * MB // 14)) + "}",
        '{"a":' * (4 * MB // 5),
        "{" + " " * 4 * MB + '"model":"m","messages":[]}',
    ],
    ids=["members", "one name", "messages again and again", "without end", "blanks"],
)
def test_no_object_costs_more_than_four_strings_of_its_size(beds: Callable[[str], Bed], body: str) -> None:
    beds("plain").check(CHAT, body.encode())


@pytest.mark.slow
def test_the_worst_that_was_seen_costs_no_more_than_strings(beds: Callable[[str], Bed]) -> None:
    """The cheap part of it: one body of each kind, which took fifty strings' time and more."""
    for place, unit in (
        (PLACES[0], "{}"),
        (PLACES[1], '{"type":"text","text":"x"}'),
        (PLACES[10], '""'),
        (PLACES[4], "[]"),
    ):
        check(beds("plain"), place, "wide", unit, 2 * MB)
