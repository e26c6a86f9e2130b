"""What placement shows to a scrape: decisions by reason, what was expected of caches and what was found, learnt speeds.

Labels stay bounded: reasons are the gateway's own words, backends are those that are configured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from time import monotonic
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pd_proxy.telemetry.records import PrefixCounts


class Decisions(Protocol):
    """What a scrape reads of the decisions."""

    @property
    def counts(self) -> Mapping[tuple[str, str], int]:
        """By the pool that answers and the reason."""

    @property
    def local(self) -> Mapping[tuple[str, str], int]:
        """Those by which a backend prefills for itself, by pool and reason."""


class Figures(Protocol):
    """The prefix index in numbers."""

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
    """A backend with what was learnt of it."""

    @property
    def role(self) -> str: ...
    @property
    def url(self) -> str: ...
    @property
    def speeds(self) -> Speeds: ...


_POOL_BACKEND = ("pool", "backend")


class PlacementSink(Collector):
    """Shows placement's own state.

    Arguments:
        fleet: the backends that there are.
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
        yield _counter(
            "pd_proxy_placement_decisions",
            "Tries by the pool that answers and the reason of the decision; none: nobody could be given it.",
            ("pool", "decision"),
            self._decisions.counts,
        )
        yield _counter(
            "pd_proxy_local_prefills",
            "Tries that one backend prefills and answers though there are pools for a pair, by its pool and why.",
            ("pool", "decision"),
            self._decisions.local,
        )
        yield _counter(
            "pd_proxy_prefix_expected_tokens",
            "Prompt tokens that were expected in prefix caches, of prompts whose engine said what it found.",
            _POOL_BACKEND,
            self._found.expected,
        )
        yield _counter(
            "pd_proxy_prefix_cached_tokens",
            "Prompt tokens that engines reported to have found in their prefix caches.",
            _POOL_BACKEND,
            self._found.cached,
        )
        yield from self._index_families()
        yield from self._speeds()

    def _index_families(self) -> Iterator[Metric]:
        now = self._index.figures(self._clock())
        for name, text, value in (
            ("entries", "Blocks that engines are believed to have cached, over all engines.", float(now.entries)),
            ("blocks", "Different blocks among them.", float(now.blocks)),
            ("bytes", "Memory of the prefix index, estimated.", float(now.bytes)),
            ("oldest_seconds", "Time since the entry was used that was not used for longest.", now.oldest),
        ):
            yield GaugeMetricFamily(f"pd_proxy_prefix_index_{name}", text, value=value)
        for name, text, count in (
            ("index_evictions", "Entries that the index dropped for want of room.", now.evictions),
            ("index_forgotten", "Entries that were dropped because their engine had lost them.", now.forgotten),
            ("reports_refused", "Engines' reports of cached tokens that could not be true.", now.refused),
        ):
            yield CounterMetricFamily(f"pd_proxy_prefix_{name}", text, value=count)
        tokens = GaugeMetricFamily(
            "pd_proxy_prefix_index_tokens",
            "Tokens of prompts that the engine is believed to have cached.",
            labels=_POOL_BACKEND,
        )
        for backend in self._fleet:
            tokens.add_metric((backend.role, backend.url), self._index.tokens(backend.url))
        yield tokens

    def _speeds(self) -> Iterator[Metric]:
        rate = GaugeMetricFamily(
            "pd_proxy_backend_prefill_tokens_per_second",
            "Learnt: uncached prompt tokens that the engine prefills in a second of busy time.",
            labels=_POOL_BACKEND,
        )
        slowness = GaugeMetricFamily(
            "pd_proxy_backend_step_slowness",
            "Learnt: the engine's decode step over that of its pool's median engine.",
            labels=_POOL_BACKEND,
        )
        wait = GaugeMetricFamily(
            "pd_proxy_backend_prefill_wait_seconds",
            "Prefill work that is believed to be before a new request at the engine.",
            labels=_POOL_BACKEND,
        )
        now = self._clock()
        for backend in self._fleet:
            labels, speeds = (backend.role, backend.url), backend.speeds
            if speeds.prefills:
                rate.add_metric(labels, speeds.rate)
            if speeds.steps:
                slowness.add_metric(labels, speeds.slowness)
            wait.add_metric(labels, speeds.ahead(now))
        yield rate
        yield slowness
        yield wait


def _counter(name: str, text: str, labels: tuple[str, ...], values: Mapping[tuple[str, str], int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family
