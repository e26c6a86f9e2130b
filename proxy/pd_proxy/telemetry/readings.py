"""The metrics of the fleet and of the clients' connections. Each is read from the state of its owner at each scrape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from pd_proxy import __version__
from pd_proxy.telemetry.families import POOL_BACKEND, Reading, Samples, counter, counters, gauge, gauges


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

    @property
    def handoffs_pending(self) -> int: ...

    def __iter__(self) -> Iterator[BackendState]: ...

    def states(self) -> Iterable[tuple[BackendState, str]]:
        """Every backend with its state."""

    def panicking(self) -> Iterable[tuple[str, bool]]:
        """Every pool, and whether its ejections are ignored."""

    @property
    def ejections(self) -> Mapping[tuple[str, str, str, str], int]:
        """Ejections, by pool, backend, leg and reason."""

    @property
    def budget_refusals(self) -> Mapping[str, int]:
        """Retries that the budget refused, by pool."""

    @property
    def excused_checks(self) -> Mapping[str, int]:
        """Failed health checks that did not count, by reason."""

    @property
    def messages(self) -> Mapping[str, Mapping[str, int]]:
        """Messages of engines over ZeroMQ, by kind and by how they were handled."""

    @property
    def warmups(self) -> Mapping[str, int]:
        """Warm-ups, by result."""

    def names(self, model: str) -> bool: ...

    def not_ready(self) -> str: ...

    def readiness(self) -> Mapping[str, str]:
        """What each group lacks to be ready; empty where it is ready."""


class BodyState(Protocol):
    """What a scrape reads of request bodies."""

    @property
    def held(self) -> int: ...

    @property
    def limit(self) -> int: ...

    @property
    def refused(self) -> Mapping[str, int]: ...


class ConnectionState(Protocol):
    """What a scrape reads of the clients' connections."""

    @property
    def open(self) -> int: ...

    @property
    def limit(self) -> int: ...

    @property
    def refused(self) -> int: ...

    @property
    def bodies(self) -> BodyState: ...


_WHY_IGNORED: Mapping[str, str] = {"mass": "mass_failure", "late": "gateway_delayed"}
"""Reasons of `Fleet.excused_checks` -> label values of the metric."""

FLEET: tuple[Reading[FleetState], ...] = (
    gauges(
        "pd_proxy_backend_inflight_requests",
        "Legs in flight.",
        POOL_BACKEND,
        lambda fleet: ((_labels(backend), backend.inflight_requests) for backend in fleet),
    ),
    gauges(
        "pd_proxy_backend_inflight_tokens",
        "Tokens in flight, estimated.",
        POOL_BACKEND,
        lambda fleet: ((_labels(backend), backend.inflight_tokens) for backend in fleet),
    ),
    gauges(
        "pd_proxy_backend_open_handoffs",
        "Hand-offs that this prefill backend must be kept for.",
        POOL_BACKEND,
        lambda fleet: ((_labels(backend), backend.open_handoffs) for backend in fleet),
    ),
    gauges(
        "pd_proxy_backend_handoff_verified",
        "Whether a hand-off of this prefill or decode backend has ever worked, in a warm-up or for a request.",
        POOL_BACKEND,
        lambda fleet: (
            (_labels(backend), float(backend.handed_over)) for backend in fleet if backend.role in ("prefill", "decode")
        ),
    ),
    counters(
        "pd_proxy_pair_warmups",
        "Warm-ups of pairs, by their result.",
        ("result",),
        lambda fleet: _by_one_label(fleet.warmups),
    ),
    gauges(
        "pd_proxy_backend_up",
        "Whether the backend is given requests.",
        POOL_BACKEND,
        lambda fleet: ((_labels(backend), float(state in ("up", "slow_start"))) for backend, state in fleet.states()),
    ),
    gauges(
        "pd_proxy_backend_state",
        "1 for the state that the backend is in, 0 for the others.",
        (*POOL_BACKEND, "state"),
        lambda fleet: (
            ((*_labels(backend), state), float(state == current))
            for backend, current in fleet.states()
            for state in BACKEND_STATES
        ),
    ),
    gauges(
        "pd_proxy_pool_panic",
        "Whether so few backends of the pool are healthy that its ejections are ignored.",
        ("pool",),
        lambda fleet: (((pool,), float(panics)) for pool, panics in fleet.panicking()),
    ),
    counters(
        "pd_proxy_backend_ejections",
        "Ejections of the backend by the outlier detector, by leg and reason.",
        (*POOL_BACKEND, "leg", "reason"),
        lambda fleet: fleet.ejections.items(),
    ),
    counters(
        "pd_proxy_retry_budget_refusals",
        "Retries that the pool's retry budget refused.",
        ("pool",),
        lambda fleet: _by_one_label(fleet.budget_refusals),
    ),
    counters(
        "pd_proxy_health_checks_ignored",
        "Failed health checks that took no backend out, since most failed at once or the gateway itself was late.",
        ("reason",),
        lambda fleet: (((_WHY_IGNORED.get(why, why),), count) for why, count in fleet.excused_checks.items()),
    ),
    counters(
        "pd_proxy_engine_messages",
        "Messages that engines sent over ZeroMQ, by how they were handled.",
        ("message", "result"),
        lambda fleet: (
            ((kind, result), count) for kind, results in fleet.messages.items() for result, count in results.items()
        ),
    ),
    gauge(
        "pd_proxy_handoffs_pending",
        "Hand-offs that prefill has returned and decode has not begun to use.",
        lambda fleet: fleet.handoffs_pending,
    ),
    gauge("pd_proxy_ready", "Whether the gateway could serve a request now.", lambda fleet: not fleet.not_ready()),
    gauges(
        "pd_proxy_group_ready",
        "Whether the group's backends could serve a request now.",
        ("group",),
        lambda fleet: (((name,), float(not missing)) for name, missing in fleet.readiness().items()),
    ),
    gauges("pd_proxy_build_info", "Constant 1.", ("version",), lambda fleet: (((__version__,), 1.0),)),
)
"""What a scrape reads of the fleet."""


CONNECTIONS: tuple[Reading[ConnectionState], ...] = (
    gauge("pd_proxy_client_connections", "Open connections of clients.", lambda now: now.open),
    gauge("pd_proxy_client_connections_limit", "The most that may be open at a time.", lambda now: now.limit),
    counter(
        "pd_proxy_client_connections_refused",
        "Connections that got a 503, or were closed at once, because of the limit.",
        lambda now: now.refused,
    ),
    gauge("pd_proxy_request_body_bytes", "Bytes of request bodies in memory.", lambda now: now.bodies.held),
    gauge("pd_proxy_request_body_bytes_limit", "The most that may be in memory.", lambda now: now.bodies.limit),
    counters(
        "pd_proxy_request_bodies_refused",
        "Bodies that were refused because the limit was reached: new ones (full), and uploads that had stalled then.",
        ("reason",),
        lambda now: _by_one_label(now.bodies.refused),
    ),
)
"""What a scrape reads of the clients' connections."""


def _labels(backend: BackendState) -> tuple[str, str]:
    return backend.role, backend.url


def _by_one_label(counts: Mapping[str, int]) -> Samples:
    return (((value,), count) for value, count in counts.items())
