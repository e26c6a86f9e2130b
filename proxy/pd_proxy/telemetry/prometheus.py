"""The Prometheus sink: counters and histograms as plain dictionaries, read when they are scraped.

Label values are bounded whatever clients send: endpoints, reasons and stages are fixed sets, backends are those of the
fleet, and a model that no backend has is counted as `other`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pd_proxy.telemetry.families import POOL_BACKEND, Families, collect
from pd_proxy.telemetry.log_queue import lines_dropped
from pd_proxy.telemetry.old_names import WithOldNames
from pd_proxy.telemetry.readings import CONNECTIONS, FLEET, ConnectionState, FleetState
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


class _Labels(NamedTuple):
    """The counters of requests of one endpoint, model and outcome."""

    request: tuple[str, str, str]
    duration: Distribution
    prompt: tuple[str, str]
    cached: tuple[str, str]
    completion: tuple[str, str]


class _BackendTimes(NamedTuple):
    """The distributions of one backend in one pool, kept together so that one lookup finds them."""

    ttft: Distribution
    tpot: Distribution
    prefill: Distribution
    handoff: Distribution


class _Histograms:
    """The histograms of requests' durations.

    Arguments:
        in_fleet: whether a pool and backend, as label values, may have series.
    """

    __slots__ = ("duration", "handoff", "handoff_gap", "itl", "loop_delay", "prefill", "resume_gap", "tpot", "ttft")

    def __init__(self, families: Families, in_fleet: Callable[[tuple[str, ...]], bool]) -> None:
        of_backend = partial(families.histogram, labels=POOL_BACKEND, admits=in_fleet)
        self.ttft = of_backend(
            "pd_proxy_time_to_first_token_seconds",
            "From the request's arrival to its first token, as the client saw it, once for each pool it went through.",
            TTFT_BOUNDS,
        )
        self.itl = of_backend(
            "pd_proxy_inter_token_latency_seconds",
            "Gap between two tokens of a stream, as the client saw it.",
            ITL_BOUNDS,
        )
        self.tpot = of_backend(
            "pd_proxy_time_per_output_token_seconds",
            "(last token - first token) / (tokens - 1), one observation a stream.",
            ITL_BOUNDS,
        )
        self.duration = families.histogram(
            "pd_proxy_request_duration_seconds",
            "From the request's arrival to its end.",
            DURATION_BOUNDS,
            ("endpoint", "outcome"),
        )
        self.prefill = of_backend(
            "pd_proxy_prefill_duration_seconds", "The prefill leg, engine's queue included.", TTFT_BOUNDS
        )
        self.handoff = of_backend(
            "pd_proxy_handoff_duration_seconds",
            "From prefill's answer to decode's first token: KV transfer, decode's queue and its first step.",
            HANDOFF_BOUNDS,
        )
        self.handoff_gap = of_backend(
            "pd_proxy_handoff_gap_seconds",
            "From the first token, where it is prefill's, to the second, which is decode's first.",
            RESUME_BOUNDS,
        )
        self.resume_gap = families.histogram(
            "pd_proxy_resume_gap_seconds",
            "From the last token before a stream broke to the first one of its continuation.",
            RESUME_BOUNDS,
        )
        self.loop_delay = families.histogram(
            "pd_proxy_event_loop_delay_seconds",
            "How late the event loop runs a timer: the gateway's own saturation.",
            LOOP_BOUNDS,
        )


class _Counts:
    """The counters of requests, and of events in their lives."""

    __slots__ = (
        "abandoned",
        "disconnects",
        "fallbacks",
        "first_tokens",
        "not_resumed",
        "requests",
        "resumes",
        "retries",
        "tokens",
    )

    def __init__(self, families: Families) -> None:
        count = families.count
        self.requests = count("pd_proxy_requests", "Requests by how they ended.", "endpoint", "model", "outcome")
        self.tokens = count("pd_proxy_tokens", "Tokens by kind: prompt, cached, completion.", "model", "kind")
        self.retries = count("pd_proxy_retries", "Tries that failed and were followed by another.", "leg", "reason")
        self.resumes = count(
            "pd_proxy_resumes", "Streams continued on other backends, by why they had ended there.", "reason"
        )
        self.not_resumed = count(
            "pd_proxy_resumes_refused", "Broken streams that ended with an error event, by why.", "reason"
        )
        self.abandoned = count(
            "pd_proxy_handoffs_abandoned",
            "Hand-offs that no request needed any more: released, which frees prefill's blocks, or left to expire.",
            "outcome",
        )
        self.fallbacks = count("pd_proxy_fallbacks", "Requests served without a hand-off, by reason.", "reason")
        self.first_tokens = count(
            "pd_proxy_first_tokens",
            "Requests that were given to a pair, by whose token was the client's first one, and why.",
            *("source", "reason"),
        )
        self.disconnects = count(
            "pd_proxy_client_disconnects", "Clients that left before their answer was whole, by stage.", "stage"
        )


class PrometheusSink(Collector):
    """Counts the records of requests, and shows the counts with the state of the fleet.

    Arguments:
        fleet, connections: their state is read at each scrape.
    """

    def __init__(self, fleet: FleetState, connections: ConnectionState) -> None:
        def in_fleet(values: tuple[str, ...]) -> bool:
            # A request may end after its backend has left, and must not create the series again.
            return any(backend.url == values[1] for backend in fleet)

        self._fleet = fleet
        self._connections = connections
        self._families = Families()
        self._histograms = _Histograms(self._families, in_fleet)
        self._counts = _Counts(self._families)
        self._loop = self._histograms.loop_delay.at()
        self._backends: dict[tuple[str, str], _BackendTimes] = {}
        self._labels: dict[tuple[str, str, str], _Labels] = {}
        self._noted = 0  # requests whose durations are buffered

    # Telemetry

    def gaps(self, pool: str, backend: str) -> Distribution:
        return self._histograms.itl.at(pool, backend)

    def tokens_streamed(self) -> int:
        """The number of tokens in streams, without each stream's first one, of the backends in the fleet."""
        return self._histograms.itl.observed()

    def handoff_released(self, claimed: bool) -> None:
        self._counts.abandoned.values[("released" if claimed else "left_to_expire",)] += 1

    def finished(self, record: RequestRecord) -> None:
        counts = self._counts
        labels = self._labels.get((record.endpoint, record.model, record.outcome)) or self._labels_of(record)
        counts.requests.values[labels.request] += 1
        labels.duration.note(record.ended - record.started)
        if record.outcome == "client_gone":
            counts.disconnects.values[(record.where,)] += 1
        if record.not_resumed:
            counts.not_resumed.values[(record.not_resumed,)] += 1
        for retry in record.retries:
            counts.retries.values[retry] += 1
        if record.resumes:
            for reason in record.resumes:
                counts.resumes.values[(reason,)] += 1
            for gap in record.resume_gaps:
                self._histograms.resume_gap.at().observe(gap)
        if record.first_token_from and record.status == 200:
            counts.first_tokens.values[record.first_token_from, record.first_token_reason] += 1
        if record.fallback and record.status == 200:
            counts.fallbacks.values[(record.fallback,)] += 1
        tokens = counts.tokens.values
        tokens[labels.prompt] += record.prompt_tokens
        tokens[labels.cached] += record.cached_tokens
        tokens[labels.completion] += record.tokens
        if record.decode or record.prefill:
            self._times(record)
        self._noted += 1
        if self._noted >= BATCH:
            self._noted = 0
            self._families.fold()

    def _labels_of(self, record: RequestRecord) -> _Labels:
        named = self._fleet.names(record.model)
        model = record.model if named else "other"
        labels = _Labels(
            (record.endpoint, model, record.outcome),
            self._histograms.duration.at(record.endpoint, record.outcome),
            *((model, kind) for kind in ("prompt", "cached", "completion")),
        )
        if named:  # names that clients invent are not kept
            self._labels[record.endpoint, model, record.outcome] = labels
        return labels

    def _times(self, record: RequestRecord) -> None:
        """Record the durations of a request that was placed, for the backends of its last try."""
        first, tpot = record.first_token, record.tpot
        ttft = None if first is None else first - record.started
        # A prefill backend that gave the whole answer counts as a mixed one: it did both legs, and each request has to
        # be counted once by the backend that decoded it.
        alone = not record.decode
        decode = self._of_backend("mixed" if alone else record.decode_pool, record.prefill if alone else record.decode)
        if record.handoff_gap is not None:
            self._histograms.handoff_gap.at(record.decode_pool, record.decode).observe(record.handoff_gap)
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
            of = self._histograms
            found = _BackendTimes(*(kind.at(pool, url) for kind in (of.ttft, of.tpot, of.prefill, of.handoff)))
            if any(backend.url == url for backend in self._fleet):
                self._backends[pool, url] = found
        return found

    def loop_late(self, seconds: float) -> None:
        """Record how late the event loop was."""
        self._loop.observe(seconds)

    def forget(self, backend: str) -> None:
        """Drop the series of a backend that has left for good, so that the labels stay bounded."""
        self._families.forget("backend", backend)
        for key in [key for key in self._backends if key[1] == backend]:
            del self._backends[key]
        self._labels.clear()  # its models may not be served any more

    # Collector

    def collect(self) -> Iterator[Metric]:
        yield from self._families.collect()
        yield from collect(FLEET, self._fleet)
        yield from collect(CONNECTIONS, self._connections)
        yield CounterMetricFamily(
            "pd_proxy_log_lines_dropped",
            "Log lines that were not written, since standard error was not read in time or could not be written to.",
            value=lines_dropped(),
        )

    def describe(self) -> Iterable[Metric]:
        return ()


def registry(*sinks: Collector, old_names: bool = False) -> CollectorRegistry:
    """A new registry with these sinks. It is not the global one, so that two gateways in a process share no counts.

    Arguments:
        old_names: show renamed metrics under their old names too.
    """
    result = CollectorRegistry()
    for sink in sinks:
        result.register(WithOldNames(sink) if old_names else sink)
    ProcessCollector(registry=result)
    PlatformCollector(registry=result)
    return result
