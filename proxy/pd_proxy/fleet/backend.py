"""One backend as the gateway knows it, and the leases on it.

Invariant: `inflight_requests` and `inflight_tokens` change only in `Lease.__init__` and `Lease.release`. Each lease is
released exactly once, so both are zero when nothing is in flight. The same holds for `open_handoffs`, which only the
flow's `PendingHandoff` changes.
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
        kind: the engine family, with the routes that it has.
        lacks: routes of the family that the engine has said it does not have; forgotten when its models are read again.
        health: whether the engine is alive (`state.py`).
        up: its health is `UP`.
        reason: why it is not up, for people; empty when it is up.
        models: its cards of /v1/models by id; None while they are not known.
        version: what its /version says, or empty.
        group: the name of its group: the backends that may hand over to each other.
        connector: the hand-off protocol that it speaks; empty while that is not known.
        reported_connector: the connector that the engine has reported, with `connector: auto`; otherwise empty.
        coordinates: the addresses of its side of a hand-off.
        registered: the engine announces its coordinates periodically. Where the connector requires that, a backend that
            does not is down.
        ranks: tokens in flight on each of its data-parallel ranks; empty where it has one rank.
        rank_work: tokens that each rank has yet to prefill, as far as they are counted (`flow/prompts.py`).
        rank_names: the name of each rank in the prefix index.
        identity: the identity of the engine that is running now; None while it is not certain.
        engine_id: the engine id in its hand-offs since `identity` was learnt, or empty.
        handoff: the last result of a hand-off, by a warm-up or by a request.
        handed_over: a hand-off has worked since it joined the fleet; stays true when its engine restarts.
        has_reasoning: an answer to a chat has shown that a reasoning parser is on. It is never reset, since an outdated
            True does no harm.
        duty: what it is to do: serve, drain or leave (`state.py`).
        draining: its duty is not `SERVING`: it gets no new requests.
        removed: its duty is `LEAVING`.
        needs_slow_start: whether a slow start follows when it comes up: it has been up before, or was added after the
            gateway's start.
        was_up: it has been up before.
        outlier_stats: the outlier detector's statistics, for each kind of leg.
        factor: the share of its usual load that it may get, in (0, 1]; below 1 during slow start.
        speeds: what has been learnt about its speed.
        slow_since: when slow start began; None outside of it.
        resting_until: when it may get requests again, after it has answered that it is busy.
        elsewhere_requests, elsewhere_tokens: what other workers have in flight here (`workers/load_table.py`).
        open_handoffs: hand-offs of this prefill backend that decode has not begun to use.
        attention: set when its prober should look at it now.
        most_requests, most_tokens: the bounds of what may be in flight here.
        on_freed: called when a lease is released; None where no request waits for capacity.
        on_load_changed: called with the requests and the tokens in flight when these change; None without peer workers.
        on_uncached_changed: called with the tokens that it has yet to prefill, and since when (`Speeds.since`), when
            these change; None without peer workers.
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
        "has_reasoning",
        "health",
        "identity",
        "inflight_requests",
        "inflight_tokens",
        "kind",
        "lacks",
        "models",
        "most_requests",
        "most_tokens",
        "needs_slow_start",
        "on_freed",
        "on_load_changed",
        "on_uncached_changed",
        "open_handoffs",
        "outlier_stats",
        "rank_names",
        "rank_work",
        "ranks",
        "reason",
        "registered",
        "removed",
        "reported_connector",
        "resting_until",
        "role",
        "slow_since",
        "speeds",
        "up",
        "url",
        "version",
        "was_up",
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
        self.group = ""
        self.health = Health.UNPROBED
        self.up = False
        self.reason = "not probed yet"
        self.duty = Duty.SERVING
        self.draining = False
        self.removed = False
        self.needs_slow_start = False
        self.was_up = False
        legs: tuple[LegName, ...] = ("encode",) if role == "encode" else ("prefill", "decode")
        self.outlier_stats: dict[LegName, OutlierStats] = {leg: OutlierStats(window) for leg in legs}
        self.speeds = speeds or join_pool(PoolSpeeds())
        self.factor = 1.0
        self.slow_since: float | None = None
        self.resting_until = 0.0
        self.attention = asyncio.Event()
        self._know_nothing()
        self._carry_nothing()

    def _know_nothing(self) -> None:
        """Set the attributes that the engine's answers fill in."""
        self.lacks: set[str] = set()
        self.models: dict[str, dict[str, Any]] | None = None
        self.version = ""
        self.connector = ""
        self.reported_connector = ""
        self.coordinates = Coordinates()
        self.registered = False
        self._located: Coordinates | None = None  # the coordinates before those of `remember`
        self.identity: EngineIdentity | None = None
        self.engine_id = ""
        self.handoff: HandoffState = NEVER
        self.handed_over = False
        self.has_reasoning = False

    def _carry_nothing(self) -> None:
        """Set the counts of what is in flight, and their bounds."""
        self.ranks: list[int] = []
        self.rank_work: list[int] = []
        self.rank_names: tuple[str, ...] = ()
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
        self._leases: set[Lease] = set()

    def serves(self, model: str | None) -> bool:
        """Whether a request for `model` may go here; yes where its models are not known."""
        return model is None or self.models is None or model in self.models

    def offers(self, route: str) -> bool:
        """Whether a request for `route` may go here, as far as is known."""
        return route in self.kind.routes and route not in self.lacks

    @property
    def drained(self) -> bool:
        """Whether it is draining and nothing needs it any more: no leg runs, and no hand-off is still to be read."""
        busy = self.inflight_requests or self.elsewhere_requests or self.open_handoffs
        return self.draining and not busy

    @property
    def legs(self) -> tuple[LegName, ...]:
        """The legs that a backend of its role may be given."""
        return LEGS[self.role]

    def has_capacity(self, tokens: int) -> bool:
        """Whether a leg of so many tokens stays within the bounds. An idle backend has capacity for any leg: the bound
        on tokens does not limit the length of one prompt."""
        requests = self.inflight_requests + self.elsewhere_requests
        return not requests or (
            requests < self.most_requests and self.inflight_tokens + self.elsewhere_tokens + tokens <= self.most_tokens
        )

    def rank_for(self, rank: int | None) -> int:
        """The data-parallel rank for a leg: the one that placement has chosen, if it exists; otherwise the one with the
        fewest tokens in flight. Only for backends with `ranks`."""
        ranks = self.ranks
        if rank is not None and rank < len(ranks):
            return rank
        return min(range(len(ranks)), key=ranks.__getitem__)

    def locate(self, coordinates: Coordinates) -> None:
        """Set its coordinates, and as many ranks as they have."""
        self.coordinates = coordinates
        count = coordinates.dp if coordinates.dp > 1 else 0
        if len(self.ranks) != count:
            self.ranks, self.rank_work = [0] * count, [0] * count
            self.rank_names = tuple(rank_name(self.url, rank) for rank in range(count))

    def remember(self, coordinates: Coordinates) -> None:
        """Set the coordinates that a hand-off has shown; they hold until `forget_location`."""
        if self._located is None:
            self._located = self.coordinates
        self.coordinates = coordinates

    def forget_location(self) -> None:
        """Go back to the coordinates before those of `remember`: another engine may be running here now."""
        if self._located is not None:
            self.coordinates, self._located = self._located, None

    def mark_up(self) -> None:
        """Set its health to up: a probe has succeeded."""
        self.health = after(HEALTH, self.health, Event.PROBE_OK)
        self.up = self.was_up = True
        self.reason = ""

    def set_duty(self, event: Event) -> None:
        """Change its duty, as an operator or the fleet wants.

        Raises:
            ImpossibleTransition
        """
        self.duty = after(DUTY, self.duty, event)
        self.draining = self.duty is not Duty.SERVING
        self.removed = self.duty is Duty.LEAVING

    def note_down(self, reason: str) -> None:
        """Note why a probe of a backend that is not up has failed."""
        self.health = after(HEALTH, self.health, Event.PROBE_FAILED)
        self.reason = reason

    def mark_down(self, reason: str, event: Event = Event.PROBE_FAILED) -> None:
        """Set its health to down, and give up the legs that wait for a first byte from it."""
        self.health = after(HEALTH, self.health, event)
        self.up = False
        self.reason = reason
        self.learn(None)
        self.forget_location()
        self.give_up_waiting(reason)

    def give_up_waiting(self, reason: str) -> None:
        """End the legs that wait for a first byte from here, so that their requests can be tried elsewhere."""
        for lease in tuple(self._leases):
            lease.lose(BackendLost(f"{self.url} {reason}"))

    def learn(self, identity: EngineIdentity | None) -> None:
        """Set the engine's identity. None means that it is in doubt: the prober then reads it again."""
        if identity is None and self.identity is not None:
            self.attention.set()
        self.identity = identity
        self.engine_id = ""


class Lease:
    """The gateway's claim on a backend's capacity for one leg. A context manager; leaving it releases.

    Arguments:
        tokens: the leg's load: prompt tokens for prefill; prompt and expected output for decode.
        rank: the data-parallel rank that placement has chosen; None: the one with the fewest tokens in flight.
    Attributes:
        on_lost: called with the error when the leg is given up before its first byte; None where the leg does not need
            it.
        rank: the data-parallel rank of the leg; None where the backend has one rank.
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
            self._ranks = backend.ranks  # kept, since the engine may return with another number of ranks
            self.rank = backend.rank_for(rank)
            self._ranks[self.rank] += tokens

    def release(self) -> None:
        """Release the capacity. Does nothing when called again."""
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
            backend.attention.set()  # its prober forgets it when this was the last lease
        if backend.on_freed is not None:
            backend.on_freed()

    def lose(self, error: BackendError) -> None:
        """Give up the leg, where it can still be given up."""
        if self.on_lost is not None:
            self.on_lost(error)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
