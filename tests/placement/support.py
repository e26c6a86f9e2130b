"""Candidates for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pd_proxy.fleet.pool_speeds import PoolSpeeds
from pd_proxy.fleet.speeds import Speeds, join_pool
from pd_proxy.placement.ask import Ask


def zero() -> float:
    """A stand-in for the random number: always 0."""
    return 0.0


@dataclass(frozen=True)
class Backend:
    """What a policy may read where no speeds are known, and nothing else."""

    url: str
    inflight_tokens: int = 0
    inflight_requests: int = 0
    elsewhere_tokens: int = 0
    elsewhere_requests: int = 0
    factor: float = 1.0


@dataclass(eq=False)
class Engine:
    """What a policy may read, and nothing else."""

    url: str
    speeds: Speeds = field(default_factory=lambda: join_pool(PoolSpeeds()))
    inflight_tokens: int = 0
    inflight_requests: int = 0
    elsewhere_tokens: int = 0
    elsewhere_requests: int = 0
    factor: float = 1.0

    def prefills(self, tokens: int, now: float = 0.0) -> Engine:
        """Give it a prefill leg."""
        self.speeds.given(tokens, now, tokens)
        return self.decodes(tokens)

    def decodes(self, tokens: int) -> Engine:
        """Give it a request with this number of tokens."""
        self.inflight_tokens += tokens
        self.inflight_requests += 1
        return self


def engines(count: int, name: str = "e", pool: PoolSpeeds | None = None) -> list[Engine]:
    """Some engines of one pool."""
    pool = pool or PoolSpeeds()
    return [Engine(f"http://{name}{n}", join_pool(pool)) for n in range(count)]


def learnt(
    rates: Sequence[float] = (), steps: Sequence[float] = (), name: str = "e", pool: PoolSpeeds | None = None
) -> list[Engine]:
    """Engines of one pool whose speeds are known.

    Arguments:
        rates: tokens that each prefills in a second.
        steps: seconds of each one's step with almost no load; twice that with 64 sequences.
    """
    found = engines(max(len(rates), len(steps)), name, pool)
    for _ in range(30):
        for engine, rate in zip(found, rates, strict=False):
            engine.speeds.given(1000, 0.0, 1000)
            engine.speeds.answered(1000, 1000, 1000, 1000 / rate)
        for engine, step in zip(found, steps, strict=False):
            for sequences in (1, 16, 64):
                engine.speeds.stepped(step * (1 + sequences / 64), sequences, 1000 * sequences, 0.0)
    return found


def ask(prompt: int = 1000, output: int = 500, *, random: Callable[[], float] = zero, **more: object) -> Ask:
    """A request with these numbers of tokens, at the time 100 unless `now` is given."""
    return Ask(random, prompt_tokens=prompt, decode_tokens=prompt + output, **{"now": 100.0, **more})  # type: ignore[arg-type]
