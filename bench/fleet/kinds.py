"""The simulated fleets and their traffic, each with its seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from bench.fleet import traffic
from bench.fleet.decode import DecodeModel
from bench.fleet.prefill import PrefillModel
from bench.fleet.traffic import Trace

TUNING = (1, 2)
"""Seeds that thresholds may be tuned on."""
HELD_OUT = (101, 102)
"""Seeds that nothing was tuned on; bench/FLEET.md shows their figures."""


@dataclass(frozen=True)
class Change:
    """A change of an engine.

    Attributes:
        what: `slow` (from now on it takes `value` times longer), `restart` (it loses its cache and its jobs, and is
            away for `value` seconds) or `join` (it is absent before).
    """

    time: float
    what: str
    pool: str
    engine: int
    value: float = 0.0


@dataclass(frozen=True)
class Kind:
    """A fleet and its traffic.

    Attributes:
        trace: makes the requests.
        prefill, decode: an entry for each engine.
        prefill_factors, decode_factors: how many times longer than its model each takes at first.
        ranks: data-parallel ranks of each engine.
        changes: changes of engines during the run.
    """

    name: str
    what: str
    trace: Callable[[Random], Trace]
    prefill: tuple[PrefillModel, ...] = (PrefillModel(),) * 4
    decode: tuple[DecodeModel, ...] = (DecodeModel(),) * 4
    prefill_factors: tuple[float, ...] = ()
    decode_factors: tuple[float, ...] = ()
    ranks: int = 1
    changes: tuple[Change, ...] = ()


P, D = PrefillModel(), DecodeModel()


def _tenants(
    count: int = 8000,
    rate: float = 16.0,
    prompts: int = 120,
    length: int = 4000,
    output: float = 280.0,
    adapters: int = 0,
) -> Callable[[Random], Trace]:
    return lambda rng: traffic.tenants(
        rng, count, rate, prompts=prompts, length=length, output=output, adapters=adapters
    )


ALL = (
    Kind("tutorial", "3,584 tokens in, 1,536 out", lambda rng: traffic.plain(rng, 2500, 4.1)),
    Kind("mixed", "chat and documents of 100,000 tokens", lambda rng: traffic.mixed(rng, 4000, 8.0, 22.0)),
    Kind(
        "shared",
        "20 system prompts that fit every cache",
        _tenants(prompts=20, length=6000, rate=18.0, output=180.0, count=6000),
    ),
    Kind("tenants", "120 system prompts, more than one cache holds", _tenants()),
    Kind(
        "agents", "sessions of several turns with pauses, to 20,000 tokens", lambda rng: traffic.agents(rng, 4000, 1.4)
    ),
    Kind(
        "bursts",
        "chat, five times as much for 6 s of every 40",
        lambda rng: traffic.bursts(rng, 4000, 4.0, times=5.0, every=40.0, lasting=6.0),
    ),
    Kind(
        "unlike",
        "a prefill and a decode engine at half speed",
        lambda rng: traffic.plain(rng, 2500, 3.0),
        prefill_factors=(2.0, 1.0, 1.0, 1.0),
        decode_factors=(2.0, 1.0, 1.0, 1.0),
    ),
    Kind(
        "slowing",
        "a decode engine turns three times slower for 150 s",
        lambda rng: traffic.plain(rng, 2500, 3.0),
        changes=(Change(150.0, "slow", "decode", 1, 3.0), Change(300.0, "slow", "decode", 1, 1.0)),
    ),
    Kind(
        "joining",
        "tenants; a cold prefill engine joins three after 60 s",
        _tenants(rate=14.0),
        changes=(Change(60.0, "join", "prefill", 3),),
    ),
    Kind(
        "unlike caches",
        "tenants; prefill caches of 800,000, 400,000, 200,000 and 200,000 tokens",
        _tenants(),
        prefill=tuple(replace(P, capacity=size) for size in (800_000, 400_000, 200_000, 200_000)),
    ),
    Kind(
        "restart",
        "tenants; a prefill engine restarts, 20 s away and cold",
        _tenants(rate=14.0),
        changes=(Change(100.0, "restart", "prefill", 0, 20.0),),
    ),
    Kind(
        "tools",
        "one tool prompt of 8,000 tokens that all sessions share",
        lambda rng: traffic.agents(rng, 4000, 4.4, tools=1, tool_tokens=8000, turns=(2, 5), user=500),
    ),
    Kind(
        "hot",
        "a prefix of 12,000 tokens in 70 % of requests, more than one engine serves",
        lambda rng: traffic.hot(rng, 4000, 18.0, share=0.7, length=12_000),
    ),
    Kind("lora", "24 adapters with their own system prompts, 8 on an engine", _tenants(adapters=24, rate=14.0)),
    Kind(
        "pressure",
        "KV pressure on decode, with preemption",
        lambda rng: traffic.pressure(rng, 3000, 3.8),
        decode=(replace(D, capacity=125_000),) * 4,
    ),
    Kind(
        "bytes",
        "sessions and system prompts of 2.5 to 6 bytes a token",
        lambda rng: traffic.agents(rng, 4000, 1.4, tools=40, ratio=traffic.languages(rng)),
    ),
    Kind(
        "ranks",
        "tenants; 2 + 2 engines of two data-parallel ranks",
        _tenants(),
        prefill=(P,) * 2,
        decode=(D,) * 2,
        ranks=2,
    ),
    Kind(
        "ratio",
        "two prefill engines too few for six decode engines",
        lambda rng: traffic.chat(rng, traffic.arrivals(rng, 15.0, 4000), prompt=900, output=200),
        prefill=(P,) * 2,
        decode=(D,) * 6,
    ),
    Kind(
        "large",
        "64 + 64 engines: tenants, chat and documents",
        lambda rng: sorted(
            [
                *traffic.tenants(rng, 12_000, 190.0, prompts=600, length=4000),
                *traffic.mixed(rng, 4000, 63.0, 3.5),
            ],
            key=lambda request: request.time,
        ),
        prefill=(P,) * 64,
        decode=(D,) * 64,
    ),
)
BY_NAME = {kind.name: kind for kind in ALL}
QUICK = ("tutorial", "mixed", "tenants", "unlike")
"""The kinds that `--quick` runs."""


def trace(kind: Kind, seed: int) -> Trace:
    """A kind's requests; the same for the same seed."""
    return kind.trace(Random(f"{kind.name} {seed}"))  # a string as seed is stable: `Random` uses its SHA-512
