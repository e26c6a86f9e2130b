"""The metrics of placement: decisions by reason, expected and actual prefix cache hits, learnt speeds.

The labels are bounded: reasons are a fixed set, and backends are those of the fleet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pd_proxy.telemetry.families import POOL_BACKEND, Reading, collect, counter, counters, gauge, gauges
from pd_proxy.telemetry.records import PrefixCounts


class Decisions(Protocol):
    """What a scrape reads of the decisions."""

    @property
    def counts(self) -> Mapping[tuple[str, str], int]:
        """All decisions, by the pool that answers and the reason."""

    @property
    def local(self) -> Mapping[tuple[str, str], int]:
        """Decisions that have one backend prefill and decode, by pool and reason."""


class Figures(Protocol):
    """What a scrape reads of the prefix index, at one moment."""

    @property
    def entries(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def oldest(self) -> float: ...
    @property
    def evictions(self) -> int: ...
    @property
    def forgotten(self) -> int: ...
    @property
    def refused(self) -> int: ...


class Index(Protocol):
    """What a scrape reads of the prefix index."""

    def figures(self, now: float) -> Figures: ...

    def tokens(self, engine: str) -> int: ...


class Speeds(Protocol):
    """What a scrape reads of an engine's learnt speeds."""

    @property
    def prefills(self) -> bool: ...
    @property
    def steps(self) -> bool: ...
    @property
    def rate(self) -> float: ...
    @property
    def slowness(self) -> float: ...

    def ahead(self, now: float) -> float: ...


class Learnt(Protocol):
    """What a scrape reads of a backend: its learnt speeds."""

    @property
    def role(self) -> str: ...
    @property
    def url(self) -> str: ...
    @property
    def speeds(self) -> Speeds: ...


@dataclass(frozen=True, slots=True)
class State:
    """Everything that a scrape reads of placement, at one moment."""

    decisions: Decisions
    index: Index
    figures: Figures
    found: PrefixCounts
    fleet: Iterable[Learnt]
    now: float


PLACEMENT: tuple[Reading[State], ...] = (
    counters(
        "pd_proxy_placement_decisions",
        "Tries by the pool that answers and the reason of the decision; none: there was no backend for it.",
        ("pool", "decision"),
        lambda state: state.decisions.counts.items(),
    ),
    counters(
        "pd_proxy_local_prefills",
        "Tries that one backend prefills and answers though there are pools for a pair, by its pool and why.",
        ("pool", "decision"),
        lambda state: state.decisions.local.items(),
    ),
    counters(
        "pd_proxy_prefix_expected_tokens",
        "Prompt tokens that were expected in prefix caches, of prompts whose engine reported what it found.",
        POOL_BACKEND,
        lambda state: state.found.expected.items(),
    ),
    counters(
        "pd_proxy_prefix_cached_tokens",
        "Prompt tokens that engines reported to have found in their prefix caches.",
        POOL_BACKEND,
        lambda state: state.found.cached.items(),
    ),
    gauge(
        "pd_proxy_prefix_index_entries",
        "Blocks in the prefix index, over all engines: those that they are expected to have cached.",
        lambda state: state.figures.entries,
    ),
    gauge("pd_proxy_prefix_index_blocks", "Different blocks among them.", lambda state: state.figures.blocks),
    gauge("pd_proxy_prefix_index_bytes", "Memory of the prefix index, estimated.", lambda state: state.figures.bytes),
    gauge(
        "pd_proxy_prefix_index_oldest_seconds",
        "Time since the least recently used entry was used.",
        lambda state: state.figures.oldest,
    ),
    counter(
        "pd_proxy_prefix_index_evictions",
        "Entries that the index dropped because it was full.",
        lambda state: state.figures.evictions,
    ),
    counter(
        "pd_proxy_prefix_index_invalidations",
        "Entries that were dropped because their engine had lost them.",
        lambda state: state.figures.forgotten,
    ),
    counter(
        "pd_proxy_prefix_reports_refused",
        "Engines' reports of cached tokens that could not be true.",
        lambda state: state.figures.refused,
    ),
    gauges(
        "pd_proxy_prefix_index_tokens",
        "Tokens of prompts that the engine is expected to have cached.",
        POOL_BACKEND,
        lambda state: ((_labels(backend), state.index.tokens(backend.url)) for backend in state.fleet),
    ),
    gauges(
        "pd_proxy_backend_prefill_tokens_per_second",
        "Learnt: uncached prompt tokens that the engine prefills in a second of busy time.",
        POOL_BACKEND,
        lambda state: ((_labels(backend), backend.speeds.rate) for backend in state.fleet if backend.speeds.prefills),
    ),
    gauges(
        "pd_proxy_backend_decode_step_ratio",
        "Learnt: the engine's decode step over that of its pool's median engine.",
        POOL_BACKEND,
        lambda state: ((_labels(backend), backend.speeds.slowness) for backend in state.fleet if backend.speeds.steps),
    ),
    gauges(
        "pd_proxy_backend_prefill_wait_seconds",
        "Expected prefill work before a new request at the engine.",
        POOL_BACKEND,
        lambda state: ((_labels(backend), backend.speeds.ahead(state.now)) for backend in state.fleet),
    ),
)
"""What a scrape reads of placement."""


def _labels(backend: Learnt) -> tuple[str, str]:
    return backend.role, backend.url


class PlacementSink(Collector):
    """Shows the state of placement.

    Arguments:
        fleet: the backends.
    """

    def __init__(
        self,
        decisions: Decisions,
        index: Index,
        found: PrefixCounts,
        fleet: Iterable[Learnt],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._decisions = decisions
        self._index = index
        self._found = found
        self._fleet = fleet
        self._clock = clock

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        now = self._clock()
        state = State(self._decisions, self._index, self._index.figures(now), self._found, self._fleet, now)
        return collect(PLACEMENT, state)
