"""The loads that the bench runs, and the budgets that a gateway must keep under them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a case may cost. A budget is kept when any of its bounds is.

    Arguments:
        ratio: most CPU of the gateway divided by CPU of nginx.
        cpu_us: most CPU microseconds of the gateway per unit of the case.
    """

    ratio: float
    cpu_us: float | None = None

    def holds(self, cpu_us: float, ratio: float) -> bool:
        """Whether a gateway keeps this budget that costs `cpu_us` per unit, `ratio` times nginx."""
        return ratio <= self.ratio or (self.cpu_us is not None and cpu_us <= self.cpu_us)

    def __str__(self) -> str:
        absolute = "" if self.cpu_us is None else f" or ≤ {self.cpu_us:g} µs"
        return f"≤ {self.ratio:g} x nginx{absolute}"


@dataclass(frozen=True, slots=True)
class Case:
    """One load.

    Arguments:
        name: its name for `--case`.
        what: the load in words, for the report.
        unit: what the CPU cost is divided by.
        tick_us: microseconds between two tokens of a stream, as the engines emit them; 0: as fast as they are read.
        pad_bytes: bytes added to each token's event.
        concurrency: streams open at the same time.
        requests: answers in total.
        tokens: tokens in an answer.
        prompt_bytes: size of a prompt.
        nginx_times: factor by which nginx is sent more requests. Where nginx is much faster than any gateway, the case
            would otherwise end within a tenth of a second, which is too short to measure its CPU.
        budget: the most that it may cost, if there is a budget.
        rate: streams that begin in a second; 0: one whenever one ends.
        differ_at: byte of the prompts from which each is unlike all others; -1: all prompts are the same.
        prefixes: number of different beginnings before that byte; requests have them in turn.
        first: number of the first request; two runs whose numbers overlap have prompts in common.
        prefill_us: how long a prefill leg takes.
    """

    name: str
    what: str
    unit: Literal["token", "request"]
    tick_us: int
    pad_bytes: int
    concurrency: int
    requests: int
    tokens: int
    prompt_bytes: int
    nginx_times: int = 1
    budget: Budget | None = None
    rate: int = 0
    differ_at: int = -1
    prefixes: int = 1
    first: int = 0
    prefill_us: int = 0

    def for_nginx(self) -> Case:
        """The load for nginx."""
        return replace(self, requests=self.requests * self.nginx_times)

    def quick(self) -> Case:
        """The same load cut to about a third, for a quick estimate: start and end of a stream have more weight in
        it."""
        if self.tick_us:
            return replace(self, tokens=max(2, self.tokens // 3))
        return replace(self, requests=max(self.concurrency * 2, self.requests // 3))


ALL = (
    Case(
        name="paced",
        what="576 streams, a token every 52 ms on each, 120 tokens, 16 kB prompts",
        unit="token",
        tick_us=52_000,
        pad_bytes=0,
        concurrency=576,  # the load of vllm-ascend's Qwen3-235B disaggregation tutorial
        requests=576,
        tokens=120,
        prompt_bytes=16_000,
        budget=Budget(ratio=1.35),
    ),
    Case(
        name="flood",
        what="64 streams as fast as they go, 200 tokens, 1 kB prompts",
        unit="token",
        tick_us=0,
        pad_bytes=0,
        concurrency=64,
        requests=600,
        tokens=200,
        prompt_bytes=1_000,
    ),
    Case(
        name="short",
        what="2-token answers, 1 kB prompts, 32 at a time",
        unit="request",
        tick_us=0,
        pad_bytes=0,
        concurrency=32,
        requests=3_000,
        tokens=2,
        prompt_bytes=1_000,
        nginx_times=10,
        budget=Budget(ratio=5, cpu_us=160),
    ),
    Case(
        name="long",
        what="2-token answers, 400 kB prompts, 16 at a time",
        unit="request",
        tick_us=0,
        pad_bytes=0,
        concurrency=16,
        requests=300,
        tokens=2,
        prompt_bytes=400_000,
        nginx_times=5,
    ),
    Case(
        name="big",
        what="300 streams, a token every 52 ms on each in an event of 1 kB, 120 tokens, 1 kB prompts",
        unit="token",
        tick_us=52_000,
        pad_bytes=800,
        concurrency=300,
        requests=300,
        tokens=120,
        prompt_bytes=1_000,
    ),
)
BY_NAME = {case.name: case for case in ALL}

STREAMS = (36, 72, 144, 288, 576, 1152)
"""Numbers of streams in the plots."""


def scale() -> list[Case]:
    """`paced` with increasing numbers of streams."""
    paced = BY_NAME["paced"]
    return [replace(paced, name=f"{n} streams", concurrency=n, requests=n, budget=None) for n in STREAMS]
