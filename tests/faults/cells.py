"""The cells of the matrix: which fault, at which stage, and how it is brought about at exactly that stage.

A fault is put on the first backend of a pool, which is the one that the request meets, and stays there until the cell
has ended. `strike` arranges it; what makes no sense is not here but in `expected.py`, with its reason.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pd_proxy_simulator import Simulator

from tests.faults.bed import Bed

TOKENS = 24
MIDDLE = 10
"""Tokens of the answer, and after how many it is cut in its middle: inside a character (`PROMPT` is chosen so)."""
PROMPT = (
    "The decode backend reads the cache of the prefill backend and goes on from there, token by token. Take number 539."
)

FAULTS = {
    "kill": "kill -9",
    "kill pair": "kill -9 of both engines of the pair",
    "hang": "hang",
    "reset": "reset",
    "500": "500",
    "503": "503",
    "429": "429 with Retry-After",
    "garbage": "garbage bytes",
    "garbled": "garbled JSON",
    "truncated": "truncated chunk",
    "error": "`error` in a 200",
    "empty": "empty 200",
    "no params": "missing hand-off params",
    "expired": "expired lease",
    "recomputed": "preempted (`recomputed`)",
    "abort": "SIGTERM (`abort`)",
    "crawl": "slow to a crawl",
    "wrong model": "wrong model (404)",
    "clock": "clock jump",
}
STAGES = {
    "connect, prefill": "before connect: prefill",
    "prefill": "during prefill",
    "between, prefill": "between the legs: prefill",
    "connect, decode": "before connect: decode",
    "between, decode": "between the legs: decode",
    "headers": "before decode's headers",
    "role": "after headers",
    "first": "after the first token",
    "middle": "mid-stream",
    "last": "at the last token",
}
ENDPOINTS = ("chat", "completions")


@dataclass(frozen=True)
class Cell:
    """One run: a fault at a stage of a request of some shape.

    Attributes:
        ahead: the client has its first token from prefill, so that decode's first is the answer's second.
    """

    fault: str
    stage: str
    endpoint: str
    stream: bool
    ahead: bool = False

    @property
    def id(self) -> str:
        shape = f"{self.endpoint}{'-streamed' if self.stream else ''}"
        shape += "-ahead" if self.ahead else ""
        return f"{self.fault}-{self.stage}-{shape}".replace(", ", "-").replace(" ", "-")


def request(endpoint: str, stream: bool) -> dict[str, Any]:
    """What is asked."""
    asked: dict[str, Any] = {"model": "sim", "max_tokens": TOKENS, "temperature": 0}
    if endpoint == "chat":
        asked["messages"] = [{"role": "user", "content": PROMPT}]
    else:
        asked["prompt"] = PROMPT
    return {**asked, "stream": True, "stream_options": {"include_usage": True}} if stream else asked


def settings_for(fault: str, *, ahead: bool) -> dict[str, Any]:
    """The settings in which the gateway of a fault's cells differs from the others."""
    whose = {"first_token": "auto" if ahead else "decode"}
    if fault == "expired":  # a decode backend that cannot be reached until the hand-off has grown too old to be sent
        return {**whose, "timeouts": {"connect": 5.0}}
    return whose


class WallClock:
    """`time.time`, which can jump."""

    def __init__(self) -> None:
        self.offset = 0.0
        self._true = time.time

    def __call__(self) -> float:
        return self._true() + self.offset


def strike(bed: Bed, cell: Cell, wall: WallClock) -> Awaitable[None] | None:
    """Arrange a cell's fault. What is to be done at a moment that only the engines know is returned, to be run beside
    the request."""
    p, d = bed.prefill[0], bed.decode[0]
    fault, stage = cell.fault, cell.stage
    if fault == "kill" or fault == "kill pair":
        return _kill(cell, p, d, both=fault == "kill pair")
    if fault == "hang":
        return _hang(bed, cell, p, d)
    if fault == "reset":
        return _reset(cell, p, d)
    if fault == "recomputed":
        if stage == "prefill":
            p.faults.add("recomputed", leg="prefill", after_tokens=0)
        else:
            d.faults.add("recomputed", after_tokens={"role": 0, "first": 1, "middle": MIDDLE - cell.ahead}[stage])
        return None
    if fault == "abort":
        engine = p if stage == "prefill" else d
        return when(*moment(cell, p, d), engine.terminate)
    if fault == "no params":
        p.faults.add("drop_handoff_params", leg="prefill")
        return None
    if fault == "expired":
        bed.swallow(d)
        return None
    if fault == "crawl":
        return _crawl(cell, p, d)
    if fault == "clock":
        return _jump(cell, p, d, wall)
    _answer_badly(cell, p if stage == "prefill" else d)
    return None


async def when(engine: Simulator, true: Callable[[], bool], then: Callable[[], object]) -> None:
    """Do something as soon as something is true of an engine, before anybody else hears of it."""
    await engine.wait_for(true, 30)
    then()


def moment(cell: Cell, p: Simulator, d: Simulator) -> tuple[Simulator, Callable[[], bool]]:
    """When a stage has been reached: whom to ask, and what."""
    stage, said = cell.stage, d.engine.stats.generation_tokens - cell.ahead
    return {
        "prefill": (p, lambda: p.engine.waiting + p.engine.running > 0),
        "between, prefill": (p, lambda: p.engine.stranded_blocks > 0),
        "between, decode": (p, lambda: p.engine.stranded_blocks > 0),
        "headers": (d, lambda: len(d.requests) > 0),
        "role": (d, lambda: d.engine.waiting + d.engine.running > 0),
        "first": (d, lambda: d.engine.stats.generation_tokens > said + cell.ahead),
        "middle": (d, lambda: d.engine.stats.generation_tokens >= said + MIDDLE),
        "last": (d, lambda: d.engine.stats.generation_tokens >= said + TOKENS),
    }[stage]


def tokens_at(cell: Cell) -> int:
    """`after_tokens` of a stage. An answer in one piece has said nothing until all of it is there: its headers go out
    after the last token, and half the body with them."""
    if cell.stream:
        return {"role": 0, "first": 1, "middle": MIDDLE - cell.ahead, "last": -1}[cell.stage]
    return {"role": -1, "first": 1, "middle": MIDDLE - cell.ahead, "last": TOKENS - cell.ahead}[cell.stage]


def _kill(cell: Cell, p: Simulator, d: Simulator, *, both: bool) -> Awaitable[None] | None:
    stage = cell.stage

    def kill() -> None:
        if both or "prefill" in stage:
            p.kill()
        if both or "prefill" not in stage:
            d.kill()

    if stage.startswith("connect"):
        kill()
        return None
    if stage in ("prefill", "between, prefill", "between, decode"):
        return when(*moment(cell, p, d), kill)
    if stage == "headers":
        d.faults.add("delay_first_byte", delay_s=0.05)
        return when(*moment(cell, p, d), kill)
    d.faults.add("die_mid_stream", ending="kill", after_tokens=tokens_at(cell))
    return when(d, lambda: not d.alive, p.kill) if both else None


def _hang(bed: Bed, cell: Cell, p: Simulator, d: Simulator) -> Awaitable[None] | None:
    stage = cell.stage

    def stop(engine: Simulator) -> None:
        for leg in ("any", "pull", "health"):
            engine.faults.add("hang", leg=leg)

    match stage:
        case "connect, prefill":
            bed.swallow(p)
        case "prefill":
            p.faults.add("hang")
        case "between, prefill":
            return when(*moment(cell, p, d), lambda: stop(p))
        case "connect, decode":
            bed.swallow(d)
        case "headers":
            d.faults.add("hang")
        case _:
            d.faults.add("stall_mid_stream", after_tokens=tokens_at(cell))
    if not cell.stream and stage not in ("connect, prefill", "prefill", "connect, decode"):
        d.faults.add("hang", leg="health")  # nothing else tells a long answer from a hung engine
    return None


def _reset(cell: Cell, p: Simulator, d: Simulator) -> Awaitable[None] | None:
    match cell.stage:
        case "connect, prefill":
            p.faults.add("refuse")
        case "prefill":
            p.faults.add("reset")
        case "between, prefill":
            p.faults.add("reset", leg="pull")
        case "connect, decode":
            d.faults.add("refuse")
        case "between, decode":
            return when(*moment(cell, p, d), lambda: d.faults.add("refuse"))
        case "headers":
            d.faults.add("reset")
        case _:
            d.faults.add("die_mid_stream", ending="reset", after_tokens=tokens_at(cell))
    return None


def _answer_badly(cell: Cell, engine: Simulator) -> None:
    fault, stage = cell.fault, cell.stage
    early = stage in ("prefill", "headers")
    match fault:
        case "500" | "503":
            engine.faults.add("status", status=int(fault))
        case "429":
            engine.faults.add("status", status=429, retry_after=7)
        case "wrong model":
            engine.faults.add("status", status=404)
        case "garbage" if early:
            engine.faults.add("garbage", form="bytes")
        case "garbled" if not cell.stream or early:
            engine.faults.add("garbage", form="json")
        case "error" if not cell.stream or early:
            engine.faults.add("garbage", form="error")
        case "truncated" if early:
            engine.faults.add("garbage", form="truncated")
        case "empty" if early:
            engine.faults.add("garbage", form="empty")
        case _:
            ending = {"garbled": "json", "empty": "end" if stage == "last" else "done"}.get(fault, fault)
            engine.faults.add("die_mid_stream", ending=ending, after_tokens=tokens_at(cell))


def _crawl(cell: Cell, p: Simulator, d: Simulator) -> Awaitable[None] | None:
    """Each step takes a hundred times as long: a stream then takes longer than any single limit of the gateway."""
    match cell.stage:
        case "prefill":
            p.faults.add("slow", factor=50)
        case "between, prefill":
            p.faults.add("delay_first_byte", leg="pull", delay_s=0.9)
        case "headers":
            d.faults.add("delay_first_byte", delay_s=1.5)
        case "role" if not cell.stream:
            d.faults.add("slow_body", piece_bytes=60, delay_s=0.5)
        case "role":
            d.faults.add("slow", factor=100)
        case _:
            return when(*moment(cell, p, d), lambda: d.faults.add("slow", factor=100))
    return None


def _jump(cell: Cell, p: Simulator, d: Simulator, wall: WallClock) -> Awaitable[None] | None:
    """The wall clock leaps a day ahead, or back where the one before went ahead."""

    def leap() -> None:
        wall.offset = -86_400.0 if wall.offset > 0 else 86_400.0

    if cell.stage == "connect, prefill":
        leap()
        return None
    return when(*moment(cell, p, d), leap)
