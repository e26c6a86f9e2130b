"""The Prometheus sink: counters and histograms as plain dictionaries, read when they are scraped.

Label values stay bounded whatever clients send: endpoints, reasons and stages are the gateway's own words, backends
are those that are configured, and a model that no backend has named is counted as `other`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pd_proxy import __version__
from pd_proxy.telemetry.log_queue import lines_dropped
from pd_proxy.telemetry.records import (
    BATCH,
    DURATION_BOUNDS,
    HANDOFF_BOUNDS,
    ITL_BOUNDS,
    LOOP_BOUNDS,
    RESUME_BOUNDS,
    TTFT_BOUNDS,
    Distribution,
    RequestRecord,
)


class BackendState(Protocol):
    """What a scrape reads of a backend."""

    @property
    def role(self) -> str: ...
    @property
    def url(self) -> str: ...
    @property
    def up(self) -> bool: ...
    @property
    def removed(self) -> bool: ...
    @property
    def inflight_requests(self) -> int: ...
    @property
    def inflight_tokens(self) -> int: ...
    @property
    def open_handoffs(self) -> int: ...
    @property
    def handed_over(self) -> bool: ...


BACKEND_STATES = ("up", "slow_start", "ejected", "draining", "down")


class FleetState(Protocol):
    """What a scrape reads of the fleet."""

    handoffs_pending: int

    def __iter__(self) -> Iterator[BackendState]: ...

    def states(self) -> Iterable[tuple[BackendState, str]]:
        """Every backend with its state."""

    def panicking(self) -> Iterable[tuple[str, bool]]:
        """Every pool, and whether its ejections are ignored."""

    @property
    def ejections(self) -> Mapping[tuple[str, str, str, str], int]:
        """By pool, backend, leg and reason."""

    @property
    def budget_refusals(self) -> Mapping[str, int]:
        """By pool."""

    @property
    def excused_checks(self) -> Mapping[str, int]:
        """Failed health checks that did not count, by why."""

    @property
    def messages(self) -> Mapping[str, Mapping[str, int]]:
        """Of engines over ZeroMQ, by kind and by what became of them."""

    @property
    def warmups(self) -> Mapping[str, int]:
        """By what came of them."""

    def names(self, model: str) -> bool: ...

    def not_ready(self) -> str: ...

    def readiness(self) -> Mapping[str, str]:
        """What each group lacks."""


class BodyState(Protocol):
    """What a scrape shows of requests' bodies."""

    @property
    def held(self) -> int: ...

    @property
    def limit(self) -> int: ...

    @property
    def refused(self) -> Mapping[str, int]: ...


class ConnectionState(Protocol):
    """What a scrape shows of the clients' connections."""

    @property
    def open(self) -> int: ...

    @property
    def limit(self) -> int: ...

    @property
    def refused(self) -> int: ...

    @property
    def bodies(self) -> BodyState: ...


class Histogram:
    """Distributions by label values.

    Arguments:
        admits: whether a new set of label values is to be shown; what is observed under others is lost.
    """

    __slots__ = ("_admits", "_bounds", "_children", "_help", "_labels", "_name")

    def __init__(
        self,
        name: str,
        text: str,
        labels: tuple[str, ...],
        bounds: tuple[float, ...],
        admits: Callable[[tuple[str, ...]], bool] = lambda values: True,
    ) -> None:
        self._name = name
        self._help = text
        self._labels = labels
        self._bounds = bounds
        self._admits = admits
        self._children: dict[tuple[str, ...], Distribution] = {}

    def at(self, *values: str) -> Distribution:
        """The distribution of one set of label values."""
        child = self._children.get(values)
        if child is None:
            child = Distribution(self._bounds)
            if self._admits(values):
                self._children[values] = child
        return child

    def fold(self) -> None:
        """Count what waits in its distributions."""
        for child in self._children.values():
            child.fold()

    def observed(self) -> int:
        """Observations so far, of all label values that are shown."""
        return sum(sum(child.counts) for child in self._children.values())

    def forget(self, value: str) -> None:
        """Drop what carries a label value, once nothing will be observed under it."""
        for values in [values for values in self._children if value in values]:
            del self._children[values]

    def collect(self) -> Metric:
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        for values, child in self._children.items():
            if values and not any(child.counts):
                continue  # a backend that never did this has no series of it
            buckets, total = [], 0
            for bound, count in zip((*self._bounds, float("inf")), child.counts, strict=True):
                total += count
                buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
            family.add_metric(values, buckets, child.sum)
        return family


class Count:
    """Counters by label values."""

    __slots__ = ("_help", "_labels", "_name", "values")

    def __init__(self, name: str, text: str, labels: tuple[str, ...]) -> None:
        self._name = name
        self._help = text
        self._labels = labels
        self.values: Counter[tuple[str, ...]] = Counter()

    def collect(self) -> Metric:
        family = CounterMetricFamily(self._name, self._help, labels=self._labels)
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return family


class _Labels(NamedTuple):
    """Where requests of one endpoint, model and outcome are counted."""

    request: tuple[str, str, str]
    duration: Distribution
    prompt: tuple[str, str]
    cached: tuple[str, str]
    completion: tuple[str, str]


class _BackendTimes(NamedTuple):
    """The distributions of one backend in one pool, found with one look."""

    ttft: Distribution
    tpot: Distribution
    prefill: Distribution
    handoff: Distribution


class PrometheusSink(Collector):
    """Takes the flow's records and shows them, with the fleet's state, to a scrape.

    Arguments:
        fleet, connections: whose gauges are read at each scrape.
    """

    def __init__(self, fleet: FleetState, connections: ConnectionState | None = None) -> None:
        self._fleet = fleet
        self._connections = connections
        pool_backend = ("pool", "backend")

        def in_fleet(values: tuple[str, ...]) -> bool:
            # A request may end after its backend has left, and must not bring the series back.
            return any(backend.url == values[1] for backend in fleet)

        self._ttft = Histogram(
            "pd_proxy_time_to_first_token_seconds",
            "From the request's arrival to its first token, as the client saw it, once for each pool it went through.",
            pool_backend,
            TTFT_BOUNDS,
            in_fleet,
        )
        self._itl = Histogram(
            "pd_proxy_inter_token_latency_seconds",
            "Gap between two tokens of a stream, as the client saw it.",
            pool_backend,
            ITL_BOUNDS,
            in_fleet,
        )
        self._tpot = Histogram(
            "pd_proxy_time_per_output_token_seconds",
            "(last token - first token) / (tokens - 1), one observation a stream.",
            pool_backend,
            ITL_BOUNDS,
            in_fleet,
        )
        self._duration = Histogram(
            "pd_proxy_request_duration_seconds",
            "From the request's arrival to its end.",
            ("endpoint", "outcome"),
            DURATION_BOUNDS,
        )
        self._prefill = Histogram(
            "pd_proxy_prefill_duration_seconds",
            "The prefill leg, engine's queue included.",
            pool_backend,
            TTFT_BOUNDS,
            in_fleet,
        )
        self._handoff = Histogram(
            "pd_proxy_handoff_duration_seconds",
            "From prefill's answer to decode's first token: KV transfer, decode's queue and its first step.",
            pool_backend,
            HANDOFF_BOUNDS,
            in_fleet,
        )
        self._handoff_gap = Histogram(
            "pd_proxy_handoff_gap_seconds",
            "From the first token, which prefill gave, to the second, which is decode's first.",
            pool_backend,
            RESUME_BOUNDS,
            in_fleet,
        )
        self._resume_gap = Histogram(
            "pd_proxy_resume_gap_seconds",
            "From the last token before a stream broke to the first one of its continuation.",
            (),
            RESUME_BOUNDS,
        )
        self.loop_delay = Histogram(
            "pd_proxy_event_loop_delay_seconds",
            "How late the event loop runs a timer: the gateway's own saturation.",
            (),
            LOOP_BOUNDS,
        )
        self._requests = Count("pd_proxy_requests", "Requests by how they ended.", ("endpoint", "model", "outcome"))
        self._tokens = Count("pd_proxy_tokens", "Tokens by kind: prompt, cached, completion.", ("model", "kind"))
        self._retries = Count("pd_proxy_retries", "Tries that failed and were followed by another.", ("leg", "reason"))
        self._resumes = Count("pd_proxy_resumes", "Streams continued on other backends, by what broke.", ("reason",))
        self._not_resumed = Count(
            "pd_proxy_resumes_refused", "Broken streams that ended with an error event, by why.", ("reason",)
        )
        self._released = Count(
            "pd_proxy_handoffs_released",
            "Hand-offs that nobody wanted any more: claimed, which frees prefill's blocks, or left to expire.",
            ("outcome",),
        )
        self._fallbacks = Count("pd_proxy_fallbacks", "Requests served without a hand-off, by reason.", ("reason",))
        self._first_tokens = Count(
            "pd_proxy_first_tokens",
            "Requests that were given to a pair, by who gave the client its first token, and why.",
            ("source", "reason"),
        )
        self._disconnects = Count(
            "pd_proxy_client_disconnects", "Clients that left before their answer was whole, by stage.", ("stage",)
        )
        self._loop = self.loop_delay.at()
        self._backends: dict[tuple[str, str], _BackendTimes] = {}
        self._labels: dict[tuple[str, str, str], _Labels] = {}
        self._noted = 0  # requests since what was noted of them was counted

    # Telemetry

    def gaps(self, pool: str, backend: str) -> Distribution:
        return self._itl.at(pool, backend)

    def tokens_streamed(self) -> int:
        """Tokens that streams have been given, their first ones apart, of the backends that are there."""
        return self._itl.observed()

    def handoff_released(self, claimed: bool) -> None:
        self._released.values[("claimed" if claimed else "left",)] += 1

    def finished(self, record: RequestRecord) -> None:
        labels = self._labels.get((record.endpoint, record.model, record.outcome)) or self._labels_of(record)
        self._requests.values[labels.request] += 1
        labels.duration.note(record.ended - record.started)
        if record.outcome == "client_gone":
            self._disconnects.values[(record.stage,)] += 1
        if record.not_resumed:
            self._not_resumed.values[(record.not_resumed,)] += 1
        for retry in record.retries:
            self._retries.values[retry] += 1
        if record.resumes:
            for reason in record.resumes:
                self._resumes.values[(reason,)] += 1
            for gap in record.resume_gaps:
                self._resume_gap.at().observe(gap)
        if record.first_token_from and record.status == 200:
            self._first_tokens.values[record.first_token_from, record.first_token_reason] += 1
        if record.fallback and record.status == 200:
            self._fallbacks.values[(record.fallback,)] += 1
        tokens = self._tokens.values
        tokens[labels.prompt] += record.prompt_tokens
        tokens[labels.cached] += record.cached_tokens
        tokens[labels.completion] += record.tokens
        if record.decode or record.prefill:
            self._times(record)
        self._noted += 1
        if self._noted >= BATCH:
            self._noted = 0
            for histogram in (self._duration, self._ttft, self._tpot, self._prefill, self._handoff):
                histogram.fold()

    def _labels_of(self, record: RequestRecord) -> _Labels:
        named = self._fleet.names(record.model)
        model = record.model if named else "other"
        labels = _Labels(
            (record.endpoint, model, record.outcome),
            self._duration.at(record.endpoint, record.outcome),
            *((model, kind) for kind in ("prompt", "cached", "completion")),
        )
        if named:  # what clients make up is not kept
            self._labels[record.endpoint, model, record.outcome] = labels
        return labels

    def _times(self, record: RequestRecord) -> None:
        """Note how long a request that was placed took, under the backends of its last try."""
        first, tpot = record.first_token, record.tpot
        ttft = None if first is None else first - record.started
        # A prefill backend that gave the whole answer did both, as a mixed one does: without it, those who count each
        # request once would miss such requests.
        alone = not record.decode
        decode = self._of_backend("mixed" if alone else record.decode_pool, record.prefill if alone else record.decode)
        if record.handoff_gap is not None:
            self._handoff_gap.at(record.decode_pool, record.decode).observe(record.handoff_gap)
        if record.handoff_seconds is not None:
            decode.handoff.note(record.handoff_seconds)
        if ttft is not None:
            decode.ttft.note(ttft)
        if tpot is not None:
            decode.tpot.note(tpot)
        if record.prefill:
            prefill = self._of_backend("prefill", record.prefill)
            if record.prefill_seconds is not None:
                prefill.prefill.note(record.prefill_seconds)
            if ttft is not None and not record.fallback:
                prefill.ttft.note(ttft)

    def _of_backend(self, pool: str, url: str) -> _BackendTimes:
        found = self._backends.get((pool, url))
        if found is None:
            found = _BackendTimes(*(h.at(pool, url) for h in (self._ttft, self._tpot, self._prefill, self._handoff)))
            if any(backend.url == url for backend in self._fleet):
                self._backends[pool, url] = found
        return found

    def loop_late(self, seconds: float) -> None:
        """Note how late the event loop was."""
        self._loop.observe(seconds)

    def forget(self, backend: str) -> None:
        """A backend has left for good: its series end, so that labels stay bounded as backends come and go."""
        for histogram in (self._ttft, self._itl, self._tpot, self._prefill, self._handoff, self._handoff_gap):
            histogram.forget(backend)
        for key in [key for key in self._backends if key[1] == backend]:
            del self._backends[key]
        self._labels.clear()  # a model may have left with it

    # Collector

    def collect(self) -> Iterator[Metric]:
        for family in (
            self._ttft,
            self._itl,
            self._tpot,
            self._duration,
            self._prefill,
            self._handoff,
            self._handoff_gap,
            self._resume_gap,
            self.loop_delay,
            self._requests,
            self._tokens,
            self._retries,
            self._resumes,
            self._not_resumed,
            self._released,
            self._fallbacks,
            self._first_tokens,
            self._disconnects,
        ):
            yield family.collect()
        yield from self._fleet_gauges()
        yield from self._connection_gauges()
        yield CounterMetricFamily(
            "pd_proxy_log_lines_dropped",
            "Log lines that were not written, since standard error was not read in time or could not be written to.",
            value=lines_dropped(),
        )

    def describe(self) -> Iterable[Metric]:
        return ()

    def _fleet_gauges(self) -> Iterator[Metric]:
        labels = ("pool", "backend")
        gauges: tuple[tuple[str, str, Callable[[BackendState], float]], ...] = (
            ("pd_proxy_backend_inflight_requests", "Legs in flight.", lambda b: b.inflight_requests),
            ("pd_proxy_backend_inflight_tokens", "Tokens in flight, estimated.", lambda b: b.inflight_tokens),
            (
                "pd_proxy_backend_open_handoffs",
                "Hand-offs that this prefill backend must be kept for.",
                lambda b: b.open_handoffs,
            ),
        )
        for name, text, read in gauges:
            family = GaugeMetricFamily(name, text, labels=labels)
            for backend in self._fleet:
                family.add_metric((backend.role, backend.url), float(read(backend)))
            yield family
        yield from self._handoffs(labels)
        yield from self._states(labels)
        yield GaugeMetricFamily(
            "pd_proxy_handoffs_in_limbo",
            "Hand-offs that prefill has given and decode has not begun to use.",
            value=self._fleet.handoffs_pending,
        )
        ready = GaugeMetricFamily("pd_proxy_ready", "Whether the gateway could serve a request now.")
        ready.add_metric((), float(not self._fleet.not_ready()))
        yield ready
        groups = GaugeMetricFamily(
            "pd_proxy_group_ready", "Whether the group's backends could serve a request now.", labels=("group",)
        )
        for name, missing in self._fleet.readiness().items():
            groups.add_metric((name,), float(not missing))
        yield groups
        info = GaugeMetricFamily("pd_proxy_build_info", "Constant 1.", labels=("version",))
        info.add_metric((__version__,), 1.0)
        yield info

    def _handoffs(self, labels: tuple[str, ...]) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "pd_proxy_backend_handed_over",
            "Whether a hand-off of this prefill or decode backend has ever worked, as warm-ups and requests tell.",
            labels=labels,
        )
        for backend in self._fleet:
            if backend.role in ("prefill", "decode"):
                family.add_metric((backend.role, backend.url), float(backend.handed_over))
        yield family
        warmups = CounterMetricFamily("pd_proxy_warmups", "Warm-ups of pairs, by what came of them.", labels=("found",))
        for code, count in self._fleet.warmups.items():
            warmups.add_metric((code,), count)
        yield warmups

    def _states(self, labels: tuple[str, ...]) -> Iterator[Metric]:
        up = GaugeMetricFamily("pd_proxy_backend_up", "Whether the backend is in the rotation.", labels=labels)
        states = GaugeMetricFamily(
            "pd_proxy_backend_state",
            "1 for the state that the backend is in, 0 for the others.",
            labels=(*labels, "state"),
        )
        for backend, current in self._fleet.states():
            up.add_metric((backend.role, backend.url), float(current in ("up", "slow_start")))
            for state in BACKEND_STATES:
                states.add_metric((backend.role, backend.url, state), float(state == current))
        yield up
        yield states
        panic = GaugeMetricFamily(
            "pd_proxy_pool_panic",
            "Whether so few of the pool are fit that its ejections are ignored.",
            labels=("pool",),
        )
        for pool, panics in self._fleet.panicking():
            panic.add_metric((pool,), float(panics))
        yield panic
        ejections = CounterMetricFamily(
            "pd_proxy_backend_ejections",
            "How often the breaker took the backend out, by leg and reason.",
            labels=(*labels, "leg", "reason"),
        )
        for values, count in self._fleet.ejections.items():
            ejections.add_metric(values, count)
        yield ejections
        refusals = CounterMetricFamily(
            "pd_proxy_retry_budget_refusals", "Retries that the pool's retry budget refused.", labels=("pool",)
        )
        for pool, count in self._fleet.budget_refusals.items():
            refusals.add_metric((pool,), count)
        yield refusals
        excused = CounterMetricFamily(
            "pd_proxy_health_checks_excused",
            "Failed health checks that took no backend out, since most failed at once or the gateway itself was late.",
            labels=("cause",),
        )
        for cause, count in self._fleet.excused_checks.items():
            excused.add_metric((cause,), count)
        yield excused
        messages = CounterMetricFamily(
            "pd_proxy_engine_messages",
            "Messages of engines that came over ZeroMQ, by what became of them.",
            labels=("message", "result"),
        )
        for kind, results in self._fleet.messages.items():
            for result, count in results.items():
                messages.add_metric((kind, result), count)
        yield messages

    def _connection_gauges(self) -> Iterator[Metric]:
        now = self._connections
        yield GaugeMetricFamily(
            "pd_proxy_client_connections", "Connections of clients that are open.", value=now.open if now else 0
        )
        yield GaugeMetricFamily(
            "pd_proxy_client_connections_limit", "How many may be open at a time.", value=now.limit if now else 0
        )
        yield CounterMetricFamily(
            "pd_proxy_client_connections_refused",
            "Connections that got a 503, or were closed at once, because of the limit.",
            value=now.refused if now else 0,
        )
        yield GaugeMetricFamily(
            "pd_proxy_request_body_bytes", "Bytes of request bodies that are held.", value=now.bodies.held if now else 0
        )
        yield GaugeMetricFamily(
            "pd_proxy_request_body_bytes_limit", "How many may be held.", value=now.bodies.limit if now else 0
        )
        refused = CounterMetricFamily(
            "pd_proxy_request_bodies_refused",
            "Bodies that were refused for want of room: newcomers (full), and uploads that had stalled then.",
            labels=("reason",),
        )
        for reason, count in (now.bodies.refused if now else {"full": 0, "stalled": 0}).items():
            refused.add_metric((reason,), count)
        yield refused


def registry(*sinks: Collector) -> CollectorRegistry:
    """A registry of its own, so that two gateways in one process do not share counts."""

    result = CollectorRegistry()
    for sink in sinks:
        result.register(sink)
    ProcessCollector(registry=result)
    PlatformCollector(registry=result)
    return result
