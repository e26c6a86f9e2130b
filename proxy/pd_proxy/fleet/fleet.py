"""The pools: who is in them, who is up, and what real requests say about that."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import inf
from time import monotonic
from typing import Any, Literal
from urllib.parse import urlsplit

from pd_proxy.errors import BackendBusy, BackendError, BackendFailed, BackendTimedOut, BackendUnreachable
from pd_proxy.fleet.backend import LEGS, ROLES, Backend, Role
from pd_proxy.fleet.engine_families import KINDS
from pd_proxy.fleet.health.kv_cache import Cache
from pd_proxy.fleet.health.mass_failure import EXCUSES, Delays
from pd_proxy.fleet.listeners import Listeners
from pd_proxy.fleet.outlier.breaker import FEWEST
from pd_proxy.fleet.outlier.detector import OutlierDetector
from pd_proxy.fleet.outlier.statistics import LegName
from pd_proxy.fleet.pairing import Pairing
from pd_proxy.fleet.pool_speeds import PoolSpeeds
from pd_proxy.fleet.protocols import Protocols
from pd_proxy.fleet.retry_budget import Budgets
from pd_proxy.fleet.speeds import join_pool
from pd_proxy.fleet.state import Event
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.settings.engines import DEFAULT_GROUP
from pd_proxy.settings.tree import Settings

log = logging.getLogger("pd_proxy.fleet")

_LOOK_BACK = 10.0  # seconds: twice a connection's time limit
_STOOD_STILL = 1.0  # seconds of the event loop's delay after which a connection's time limit says nothing

State = Literal["down", "draining", "ejected", "slow_start", "up"]


class Fleet:
    """All backends by role, and what is known of them together.

    Arguments:
        clock: seconds, never going back.
    Attributes:
        sizes: how many backends each pool has, up or not.
        outlier_detector: which backends are fit.
        succeeded: is told of a backend's leg that ended well.
        budgets: the pools' retry budgets.
        bounded: whether backends have bounds.
        pairing: who may hand over to whom.
        groups: the names of the groups, and the connector of each.
        messages: how many messages of engines came over ZeroMQ, by kind, and by what became of them.
        warmups: how many warm-ups there were, by the code of what was found (`findings.py`), or `ok`.
        pairs_are_tried: by warm-ups, so that a group is not ready before a hand-off of it has worked.
        answers_without_handoff: the connectors whose decode engines answer a request without a hand-off right.
        speeds: what the engines of a pool and group have in common, by both.
        delays: of the event loop.
        excused_checks: how many failed health checks did not count, by why (`mass_failure.py`).
        listeners: who is called when something of this changes (`subscribe`).
        protocols: which hand-off protocol each group speaks.
        ready_by_fallback: a group is ready though no hand-off of it has worked, where its decode serves alone.
        before_choice: called before backends are told apart by their load, where there are other workers.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = monotonic) -> None:
        self._window = settings.breaker.window
        self._clock = clock
        self.speeds: dict[tuple[Role, str], PoolSpeeds] = {}
        self.delays = Delays()
        self.excused_checks: Counter[str] = Counter(dict.fromkeys(EXCUSES, 0))
        self.outlier_detector = OutlierDetector(settings.breaker, self._peers, clock)
        self.succeeded = self.outlier_detector.succeeded
        self.budgets = Budgets(settings.retries, self.pool)
        bounds = settings.admission
        self._prefill_bounds = (bounds.prefill_requests or inf, bounds.prefill_tokens or inf)
        self._decode_bounds = (bounds.decode_requests or inf, bounds.decode_tokens or inf)
        self.bounded = (*self._prefill_bounds, *self._decode_bounds) != (inf,) * 4
        self._on_capacity: Callable[[], object] | None = None
        self._pools: dict[Role, list[Backend]] = {role: [] for role in ROLES}
        self.sizes: dict[str, int] = dict.fromkeys(ROLES, 0)
        self.handoffs_pending = 0
        self.messages: dict[str, Mapping[str, int]] = {}
        self.warmups: Counter[str] = Counter(ok=0)
        self.answers_without_handoff: frozenset[str] = frozenset()
        self.pairs_are_tried = False
        self.ready_by_fallback = settings.ready_by_fallback and settings.fallback == "local_prefill"
        self.before_choice: Callable[[], object] | None = None
        self.listeners = Listeners()
        self.subscribe = self.listeners.subscribe
        self._kinds = {group.name: KINDS[group.kind] for group in settings.all_groups()}
        self.pairing = Pairing(settings.pair_revisions)
        self.protocols = Protocols(settings.all_groups())
        self.groups = self.protocols.groups
        self._locations = {location.backend: location for location in settings.locations}
        for group in settings.all_groups():
            for role in ROLES:
                for url in getattr(group, role):
                    self.add(url, role, group.name).known = False  # all of them are as fresh as the gateway

    def __iter__(self) -> Iterator[Backend]:
        for pool in self._pools.values():
            yield from pool

    def pool(self, role: Role) -> list[Backend]:
        """The members of a pool, up or not."""
        return self._pools[role]

    def candidates(self, role: Role, model: str | None, tokens: int | None = None) -> list[Backend]:
        """The members of a pool that may be given a request for `model` now; a mixed one takes it whole.

        Arguments:
            tokens: of the leg; members that it would put above their bounds are left out, as long as others have room.
                Where none has, admission lets nobody new in; what is already in, and tries again, goes to a full one
                rather than nowhere.
        """
        if not self._pools[role]:
            return []
        if self.before_choice is not None:
            self.before_choice()
        found = self.serving(role, model)
        if self.outlier_detector.watches:
            found = self.outlier_detector.fit(found, LEGS[role][-1], lambda: self.members(role, model))
        if tokens is None or not self.bounded or len(found) < 2:
            return found
        return [b for b in found if b.has_capacity(tokens)] or found

    def serving(self, role: Role, model: str | None) -> list[Backend]:
        """Those that are up and take requests for `model`, fit or not."""
        return [
            b
            for b in self._pools[role]
            if b.up and not b.draining and (model is None or b.models is None or model in b.models)
        ]

    def members(self, role: Role, model: str | None) -> int:
        """How many of a pool are to take requests for `model`, up or not."""
        return sum(not b.draining and b.serves(model) for b in self._pools[role])

    def _peers(self, backend: Backend) -> list[Backend]:
        """The others that could take a backend's requests: of its pool, up, and with a model of its own."""
        models = backend.models
        return [
            b
            for b in self._pools[backend.role]
            if b is not backend
            and b.up
            and not b.draining
            and b.group == backend.group  # another group's hardware may be another
            and (models is None or b.models is None or not models.keys().isdisjoint(b.models))
        ]

    def configured(self, model: str | None) -> Mapping[str, int]:
        """How many backends of each role are meant for requests for `model`, up or not. Within one group these are all
        of them."""
        if len(self.groups) == 1:
            return self.sizes
        return {role: sum(b.serves(model) for b in pool) for role, pool in self._pools.items()}

    def pairer(self, model: str | None) -> Callable[[Backend, Backend], bool] | None:
        """Whether a prefill backend may hand over to a decode backend for `model`; None where any may to any."""
        return None if self.pairing.uniform else partial(self.pairing.pairs, model=model)

    def has_capacity(self, role: Role, model: str | None, tokens: int) -> bool | None:
        """Whether a candidate for `model` has room for a leg of so many tokens; None when there is no candidate. As
        `candidates`, but ends with the first that has."""
        if self.outlier_detector.watches:
            fit = self.candidates(role, model)
            return any(b.has_capacity(tokens) for b in fit) if fit else None
        if self.before_choice is not None:
            self.before_choice()
        found = None
        for b in self._pools[role]:
            if b.up and not b.draining and (model is None or b.models is None or model in b.models):
                if b.has_capacity(tokens):
                    return True
                found = False
        return found

    def watch_capacity(self, on_capacity: Callable[[], object]) -> None:
        """Have `on_room` called whenever a request that found no room may find some: a lease was released, or a pool
        has changed."""
        self._on_capacity = on_capacity
        for backend in self:
            backend.on_freed = on_capacity

    def _capacity_changed(self) -> None:
        if self._on_capacity is not None:
            self._on_capacity()

    def knows(self, model: str) -> bool:
        """Whether any backend that answers clients serves `model`, or may."""
        for pool in (self._pools["decode"], self._pools["mixed"]):
            for backend in pool:
                if backend.models is None or model in backend.models:
                    return True
        return False

    def names(self, model: str) -> bool:
        """Whether some backend has named `model`."""
        for pool in self._pools.values():
            for backend in pool:
                if backend.models is not None and model in backend.models:
                    return True
        return False

    def routes(self) -> frozenset[str]:
        """The engines' routes that there are here, by the kinds of the backends."""
        kinds = {backend.kind.name: backend.kind for backend in self}
        return frozenset().union(*(kind.routes for kind in (kinds or self._kinds).values()))

    def model_cards(self) -> list[dict[str, Any]]:
        """The models a client can ask for, as /v1/models shows them: those of the backends that answer clients. The
        context is as long as the shortest backend's, prefill's included."""
        cards: dict[str, dict[str, Any]] = {}
        for backend in (*self._pools["decode"], *self._pools["mixed"], *self._pools["prefill"]):
            for model, card in (backend.models or {}).items():
                if model in cards:
                    lengths = [c["max_model_len"] for c in (cards[model], card) if c.get("max_model_len")]
                    if lengths:
                        cards[model]["max_model_len"] = min(lengths)
                elif backend.role != "prefill":
                    cards[model] = dict(card)
        return list(cards.values())

    def state(self, backend: Backend) -> State:
        """What a backend is to new requests, in one word."""
        if backend.draining:
            return "draining"
        if not backend.up:
            return "down"
        if self.outlier_detector.ejected_for(backend):
            return "ejected"
        return "up" if backend.slow_since is None else "slow_start"

    # Membership

    def find(self, url: str, role: Role) -> Backend | None:
        return next((b for b in self._pools[role] if b.url == url), None)

    def add(self, url: str, role: Role, group: str = DEFAULT_GROUP) -> Backend:
        """Add a backend to a group, or take one back that was about to leave."""
        if backend := self.find(url, role):
            self.undrain(backend)
            return backend
        speeds = join_pool(self.speeds.setdefault((role, group), PoolSpeeds()))
        backend = Backend(url, role, kind=self._kinds[group], window=self._window, speeds=speeds)
        backend.group = group
        backend.locate(self.placed(url))
        backend.known = True  # the others have been at it for longer
        if role != "encode":
            bounds = self._prefill_bounds if role == "prefill" else self._decode_bounds
            backend.most_requests, backend.most_tokens = bounds
        backend.on_freed = self._on_capacity
        self._pools[role].append(backend)
        self.sizes[role] += 1
        self._regroup(group)
        self.listeners.join(backend)
        return backend

    def placed(self, url: str) -> Coordinates:
        """A backend's coordinates, as far as the settings tell."""
        host, location = urlsplit(url).hostname or "", self._locations.get(url)
        if location is None:
            return Coordinates(host=host)
        return Coordinates(
            host=location.host or host,
            **{name: getattr(location, name) for name in Coordinates.__struct_fields__ if name != "host"},
        )

    def drain(self, backend: Backend) -> None:
        """Give a backend nothing new. What it has ends in its own time."""
        if not backend.draining:
            log.info("%s backend %s is draining", backend.role, backend.url)
        backend.set_duty(Event.DRAIN)
        self._capacity_changed()

    def undrain(self, backend: Backend) -> None:
        """Give a backend requests again, also one that was about to leave."""
        if backend.draining:
            log.info("%s backend %s is draining no more", backend.role, backend.url)
        backend.set_duty(Event.UNDRAIN)
        backend.attention.set()  # it may have been put to sleep meanwhile
        self._capacity_changed()
        self._fits(backend)

    def remove(self, url: str, role: Role) -> bool:
        """Drain a backend and then forget it: when its last leg has ended, and nobody may still read a hand-off
        from it.

        Returns whether it was there.
        """
        backend = self.find(url, role)
        if backend is None:
            return False
        self.drain(backend)
        backend.set_duty(Event.REMOVE)
        self.forget_idle()
        return True

    def forget_idle(self) -> None:
        """Forget removed backends that are drained. Called after removals and by the prober."""
        for pool in self._pools.values():
            for backend in [b for b in pool if b.removed and b.drained]:
                pool.remove(backend)
                backend.set_duty(Event.FORGET)
                self.sizes[backend.role] -= 1
                self.outlier_detector.forget(backend)
                self.speeds[backend.role, backend.group].leave(backend.speeds)
                self._regroup(backend.group)
                log.info("%s backend %s has left", backend.role, backend.url)
                self.listeners.leave(backend)

    # What real requests tell

    def failed(self, backend: Backend, error: BackendError, leg: LegName, handoff_from: Backend | None = None) -> None:
        """A leg failed. A backend that cannot be reached is dead, until its prober says otherwise, unless the event
        loop stood still; one whose engine is leaving is ejected at once; failures of other kinds are the breaker's to
        judge.

        Arguments:
            handoff_from: the prefill backend whose hand-off a decode leg came with. Where that one is gone, it is to
                blame for a decode engine that could not read it; where it seems up, its prober should look.
        """
        if not error.blame or not backend.up:
            return
        if isinstance(error, BackendUnreachable):
            if self.delays.since(self._clock() - _LOOK_BACK) >= _STOOD_STILL:
                backend.attention.set()  # all that were connecting may have failed alike: its prober finds out
            else:
                self.take_out(backend, f"failed a request: {error}", Event.UNREACHABLE)
            return
        if error.leaves:
            self.outlier_detector.leaves(backend, str(error))
            backend.attention.set()
            return
        if handoff_from is not None and isinstance(error, BackendFailed | BackendTimedOut):
            if not handoff_from.up:
                return
            handoff_from.attention.set()
            handoff_from.learn(None)
        self.outlier_detector.failed(backend, leg, error)
        if not isinstance(error, BackendBusy):  # who says that is alive
            backend.attention.set()
            backend.learn(None)  # what failed may be another engine by now

    def timed(self, backend: Backend, leg: LegName, seconds: float, tokens: int) -> None:
        """How long a good leg took.

        Arguments:
            seconds: prefill: of the whole leg; decode: the mean for each token of a stream.
            tokens: prefill: those it computed, without cached ones; decode: those it gave.
        """
        if self.sizes[backend.role] >= FEWEST:  # of two, nobody can say which is the odd one
            self.outlier_detector.timed(backend, leg, seconds, tokens)

    def paced(self, backend: Backend, seconds: float) -> None:
        """A stream's tokens have come so many seconds apart of late, and its client has kept up."""
        backend.speeds.stepped(
            seconds,
            backend.inflight_requests + backend.elsewhere_requests,
            backend.inflight_tokens + backend.elsewhere_tokens,
            self._clock(),
        )

    # What probes tell

    def holds(self, backend: Backend, cache: Cache) -> None:
        """An engine has said what its KV cache holds."""
        backend.speeds.capacity = cache.tokens or inf
        self.listeners.cache(backend, cache)

    def lost_cache(self, backend: Backend) -> None:
        """An engine's prefix cache is empty: it has been reset, or the engine may be another by now."""
        self.listeners.lost_cache(backend)

    def learnt(self, backend: Backend, models: dict[str, dict[str, Any]] | None, version: str) -> None:
        """An engine has said which models it serves, and which version it is.

        Arguments:
            models: its cards by id; None where it did not say.
        """
        if (models, version) != (backend.models, backend.version):
            backend.models, backend.version = models, version
            self.pairing.refresh(self)
            self._capacity_changed()
            self._fits(backend)

    def _fits(self, backend: Backend) -> None:
        if backend.up:
            self.listeners.fit(backend)

    def reports_connector(self, backend: Backend) -> bool:
        """Whether the engine of a backend must report which hand-off protocol it speaks."""
        return backend.role in ("prefill", "decode") and self.protocols.reported(backend.group)

    def connector_reported(self, backend: Backend, connector: str) -> None:
        """An engine has reported which hand-off protocol it speaks; empty: it reports none."""
        if backend.reported_connector != connector:
            backend.reported_connector = connector
            self._regroup(backend.group)

    def _regroup(self, group: str) -> None:
        """A group has changed: what its members speak, and who pairs with whom."""
        for backend in self.protocols.settle(group, [b for b in self if b.group == group]):
            if backend.up and backend.role == "prefill":  # before it hands over, it is to be asked for its coordinates
                reason = f"is looked at again: it speaks {backend.connector or 'nothing that is known'}"
                self.take_out(backend, reason, Event.CONNECTOR_CHANGED)
        self.pairing.refresh(self)

    def has_lost(self, backend: Backend, model: str) -> None:
        """An engine has refused a request for a model that it was known to have, as an adapter that was unloaded."""
        if backend.models is not None and model in backend.models:
            log.info("%s backend %s does not have %s any more", backend.role, backend.url, model)
            self.learnt(
                backend, {name: card for name, card in backend.models.items() if name != model}, backend.version
            )
        backend.attention.set()  # its prober asks what it has

    def take_out(self, backend: Backend, reason: str, event: Event = Event.PROBE_FAILED) -> None:
        """Mark a backend down; its prober brings it back."""
        if backend.up:
            log.warning("%s backend %s is out: %s", backend.role, backend.url, reason)
            backend.speeds.left(self._clock())
        backend.mark_down(reason, event)
        backend.attention.set()
        self._capacity_changed()

    def bring_in(self, backend: Backend) -> None:
        """Mark a backend up."""
        if backend.up:
            return
        log.info("%s backend %s is up", backend.role, backend.url)
        returns = backend.met
        backend.mark_up()
        self.outlier_detector.returned(backend)
        backend.speeds.returned(self._clock())
        if returns:  # another worker may have sent prompts to one that is new here
            self.lost_cache(backend)
        self._capacity_changed()
        self.listeners.up(backend)
