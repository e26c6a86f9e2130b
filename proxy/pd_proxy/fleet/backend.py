"""One backend as the gateway knows it, and the leases on it.

Invariant: `inflight_requests` and `inflight_tokens` change only in `Lease.__init__` and `Lease.release`, and a lease is
released once whatever happens, so both are zero when nothing is in flight. `open_handoffs` likewise: the
flow's `PendingHandoff` counts a hand-off in and out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from types import TracebackType
from typing import Any, Literal

from pd_proxy.errors import BackendError, BackendLost
from pd_proxy.fleet.engine_families import KINDS, Kind
from pd_proxy.fleet.findings import NEVER, HandoffState
from pd_proxy.fleet.health.identity import EngineIdentity
from pd_proxy.fleet.outlier.statistics import LegName, OutlierStats
from pd_proxy.fleet.pool_speeds import PoolSpeeds
from pd_proxy.fleet.speeds import Speeds, join_pool
from pd_proxy.fleet.state import DUTY, HEALTH, Duty, Event, Health
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.prefix.index import rank_name
from pd_proxy.transitions import after

Role = Literal["prefill", "decode", "mixed", "encode"]
ROLES: tuple[Role, ...] = ("prefill", "decode", "mixed", "encode")
LEGS: dict[Role, tuple[LegName, ...]] = {
    "prefill": ("prefill",),
    "decode": ("decode",),
    "mixed": ("prefill", "decode"),
    "encode": ("encode",),
}


class Backend:
    """State of one engine endpoint.

    Attributes:
        kind: what sort of engine it is.
        lacks: routes of its kind that it has said it does not have; asked again now and then, as for its models.
        health: whether its engine is alive (`state.py`).
        up: its health is `UP`.
        reason: why it is not up, for people; empty when up.
        models: its cards of /v1/models by id, or None while that is not known.
        version: as /version says, or empty.
        group: the name of its group: backends that may hand over to each other.
        connector: the protocol that its side of a hand-off speaks; empty while that is not known.
        told: the one that its engine has told of, where it was to tell; else empty.
        coordinates: where its side of a hand-off is reached.
        registered: its engine says, again and again, where that is; who should and does not is out of the rotation.
        ranks: tokens in flight on each of its data-parallel ranks; empty where it has but one.
        rank_work: tokens that each of them has yet to prefill, as far as that is kept account of (`flow/prompts.py`).
        rank_names: what each of them is called in the prefix index.
        identity: what is surely true of the engine that is there now; None while nothing is.
        engine_id: what its hand-offs have called it since the facts were learnt, or empty.
        handoff: what was last found of its hand-offs, by a warm-up or by a request.
        handed_over: one has worked since it joined the fleet; a restart of its engine does not make that untrue.
        reasons: its answers to chats have shown a reasoning parser at work; not forgotten, since it is no danger.
        duty: what it is to do.
        draining: it is given nothing new: its duty is not `SERVING`.
        removed: its duty is `LEAVING`.
        known: it has been up before, or has been there since the gateway's start.
        met: it has been up before.
        outlier_stats: how it does at each leg.
        factor: the share of its usual load that it may be given, in (0, 1]; below 1 after its return.
        speeds: how fast it is, as learnt.
        slow_since: when it returned, while `factor` is below 1.
        resting_until: it has said that it is busy, and when to come back.
        elsewhere_requests, elsewhere_tokens: what other workers have in flight here (`workers/load_table.py`).
        open_handoffs: hand-offs of this prefill backend that decode has not yet begun to use.
        attention: set when something happened that its prober should look at now.
        most_requests, most_tokens: what may be in flight here before new requests should go elsewhere.
        on_freed: called when a lease is released, where somebody waits for room.
        on_load_changed: called with requests and tokens in flight when these change, where there are other workers.
        on_uncached_changed: likewise, with the tokens that it has yet to prefill, and since when (`Speeds.since`).
    """

    __slots__ = (
        "_leases",
        "_located",
        "attention",
        "connector",
        "coordinates",
        "draining",
        "duty",
        "elsewhere_requests",
        "elsewhere_tokens",
        "engine_id",
        "factor",
        "group",
        "handed_over",
        "handoff",
        "health",
        "identity",
        "inflight_requests",
        "inflight_tokens",
        "kind",
        "known",
        "lacks",
        "met",
        "models",
        "most_requests",
        "most_tokens",
        "on_freed",
        "on_load_changed",
        "on_uncached_changed",
        "open_handoffs",
        "outlier_stats",
        "rank_names",
        "rank_work",
        "ranks",
        "reason",
        "reasons",
        "registered",
        "removed",
        "resting_until",
        "role",
        "slow_since",
        "speeds",
        "told",
        "up",
        "url",
        "version",
    )

    def __init__(
        self,
        url: str,
        role: Role,
        *,
        kind: Kind = KINDS["vllm"],
        window: float = 30.0,
        speeds: Speeds | None = None,
    ) -> None:
        self.url = url
        self.role = role
        self.kind = kind
        self.lacks: set[str] = set()
        self.health = Health.UNPROBED
        self.up = False
        self.reason = "not probed yet"
        self.models: dict[str, dict[str, Any]] | None = None
        self.version = ""
        self.group = ""
        self.connector = ""
        self.told = ""
        self.coordinates = Coordinates()
        self.registered = False
        self._located: Coordinates | None = None  # what they were before something was remembered
        self.ranks: list[int] = []
        self.rank_work: list[int] = []
        self.rank_names: tuple[str, ...] = ()
        self.identity: EngineIdentity | None = None
        self.engine_id = ""
        self.handoff: HandoffState = NEVER
        self.handed_over = False
        self.reasons = False
        self.duty = Duty.SERVING
        self.draining = False
        self.removed = False
        self.known = False
        self.met = False
        legs: tuple[LegName, ...] = ("encode",) if role == "encode" else ("prefill", "decode")
        self.outlier_stats: dict[LegName, OutlierStats] = {leg: OutlierStats(window) for leg in legs}
        self.speeds = speeds or join_pool(PoolSpeeds())
        self.factor = 1.0
        self.slow_since: float | None = None
        self.resting_until = 0.0
        self.open_handoffs = 0
        self.inflight_requests = 0
        self.inflight_tokens = 0
        self.elsewhere_requests = 0
        self.elsewhere_tokens = 0
        self.most_requests: float = inf
        self.most_tokens: float = inf
        self.on_freed: Callable[[], object] | None = None
        self.on_load_changed: Callable[[int, int], object] | None = None
        self.on_uncached_changed: Callable[[int, float], object] | None = None
        self.attention = asyncio.Event()
        self._leases: set[Lease] = set()

    def serves(self, model: str | None) -> bool:
        """Whether a request for `model` may go here; what is not known is not held against it."""
        return model is None or self.models is None or model in self.models

    def offers(self, route: str) -> bool:
        """Whether a request for `route` may go here, as far as is known."""
        return route in self.kind.routes and route not in self.lacks

    @property
    def drained(self) -> bool:
        """It is draining, and nothing needs it any more: no leg runs, and no hand-off waits to be read from it."""
        busy = self.inflight_requests or self.elsewhere_requests or self.open_handoffs
        return self.draining and not busy

    @property
    def legs(self) -> tuple[LegName, ...]:
        """The legs that a backend of its role may be given."""
        return LEGS[self.role]

    def has_capacity(self, tokens: int) -> bool:
        """Whether a leg of so many tokens stays within the bounds. An idle backend has room for any leg: a bound on
        tokens is none on the length of one prompt."""
        requests = self.inflight_requests + self.elsewhere_requests
        return not requests or (
            requests < self.most_requests and self.inflight_tokens + self.elsewhere_tokens + tokens <= self.most_tokens
        )

    def rank_for(self, rank: int | None) -> int:
        """The data-parallel rank for a leg: the one that placement has chosen, or the one with the fewest tokens in
        flight where it has chosen none, or one that is not there any more. Only of a backend with `ranks`."""
        ranks = self.ranks
        if rank is not None and rank < len(ranks):
            return rank
        return min(range(len(ranks)), key=ranks.__getitem__)

    def locate(self, coordinates: Coordinates) -> None:
        """From now on these are its coordinates."""
        self.coordinates = coordinates
        count = coordinates.dp if coordinates.dp > 1 else 0
        if len(self.ranks) != count:
            self.ranks, self.rank_work = [0] * count, [0] * count
            self.rank_names = tuple(rank_name(self.url, rank) for rank in range(count))

    def remember(self, coordinates: Coordinates) -> None:
        """A hand-off has told these coordinates: they hold until `forget_location`."""
        if self._located is None:
            self._located = self.coordinates
        self.coordinates = coordinates

    def forget_location(self) -> None:
        """What answers here may be another engine by now: only what was set, or asked of the engine, still holds."""
        if self._located is not None:
            self.coordinates, self._located = self._located, None

    def mark_up(self) -> None:
        """Its probes succeed."""
        self.health = after(HEALTH, self.health, Event.PROBE_OK)
        self.up = self.met = True
        self.reason = ""

    def set_duty(self, event: Event) -> None:
        """An operator, or the fleet, has changed what the backend is to do."""
        self.duty = after(DUTY, self.duty, event)
        self.draining = self.duty is not Duty.SERVING
        self.removed = self.duty is Duty.LEAVING

    def note_down(self, reason: str) -> None:
        """A probe of a backend that is not up has failed."""
        self.health = after(HEALTH, self.health, Event.PROBE_FAILED)
        self.reason = reason

    def mark_down(self, reason: str, event: Event = Event.PROBE_FAILED) -> None:
        """The backend is down. Legs that wait for a first byte from it are given up."""
        self.health = after(HEALTH, self.health, event)
        self.up = False
        self.reason = reason
        self.learn(None)
        self.forget_location()
        self.give_up_waiting(reason)

    def give_up_waiting(self, reason: str) -> None:
        """Tell the legs that wait for a first byte from here that none will come, so that they can go elsewhere."""
        for lease in tuple(self._leases):
            lease.lose(BackendLost(f"{self.url} {reason}"))

    def learn(self, identity: EngineIdentity | None) -> None:
        """From now on these are its facts; with None, there is cause to doubt them, and its prober looks again."""
        if identity is None and self.identity is not None:
            self.attention.set()
        self.identity = identity
        self.engine_id = ""


class Lease:
    """The gateway's claim on a backend's capacity for one leg. A context manager; leaving it releases.

    Arguments:
        tokens: what the leg will put on the backend: prompt tokens for prefill; prompt and expected output for decode.
        rank: the backend's data-parallel rank that the leg is for, where it has several; without it the one with the
            fewest tokens in flight.
    Attributes:
        on_lost: called when the backend is given up while the leg waits for its first byte; None when the leg does
            not wish to know.
        rank: the backend's data-parallel rank that the leg is for; None where it has but one.
    """

    __slots__ = ("_ranks", "backend", "on_lost", "rank", "tokens")

    def __init__(self, backend: Backend, tokens: int, rank: int | None = None) -> None:
        self.backend = backend
        self.tokens = tokens
        self.on_lost: Callable[[BackendError], None] | None = None
        backend.inflight_requests += 1
        backend.inflight_tokens += tokens
        backend._leases.add(self)
        if backend.on_load_changed is not None:
            backend.on_load_changed(backend.inflight_requests, backend.inflight_tokens)
        self.rank: int | None = None
        if backend.ranks:
            self._ranks = backend.ranks  # the list that is counted in, should its engine come back with another
            self.rank = backend.rank_for(rank)
            self._ranks[self.rank] += tokens

    def release(self) -> None:
        backend = self.backend
        if self not in backend._leases:
            return
        backend._leases.remove(self)
        self.on_lost = None
        backend.inflight_requests -= 1
        backend.inflight_tokens -= self.tokens
        if backend.on_load_changed is not None:
            backend.on_load_changed(backend.inflight_requests, backend.inflight_tokens)
        if self.rank is not None:
            self._ranks[self.rank] -= self.tokens
        if backend.removed:
            backend.attention.set()  # its watcher forgets it when this was the last
        if backend.on_freed is not None:
            backend.on_freed()

    def lose(self, error: BackendError) -> None:
        if self.on_lost is not None:
            self.on_lost(error)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
