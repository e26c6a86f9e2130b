"""The fleet: the pools with their backends, which of these are up, and what requests and probes report about them."""

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

_LOOK_BACK = 10.0  # seconds; twice the time limit for connecting
_STOOD_STILL = 1.0  # seconds of event loop delay from which an exceeded time limit for connecting proves nothing

State = Literal["down", "draining", "ejected", "slow_start", "up"]


class Fleet:
    """All backends by role, and the state that they share.

    Arguments:
        clock: a monotonic clock, in seconds.
    Attributes:
        sizes: the number of backends in each pool, whether up or not.
        outlier_detector: decides which backends are fit.
        succeeded: called with a backend and a leg that ended well.
        budgets: the pools' retry budgets.
        bounded: whether backends have bounds.
        pairing: decides which prefill backends may hand over to which decode backends.
        groups: the connector of each group, by its name.
        messages: the number of messages that engines sent over ZeroMQ, by kind and by what became of them.
        warmups: the number of warm-ups by the code of what was found (`findings.py`), or `ok`.
        pairs_are_tried: whether warm-ups try pairs, so that a group is ready only after a hand-off has worked.
        answers_without_handoff: the connectors whose decode engines can answer a request without a hand-off.
        speeds: the shared speeds of the engines of a pool and group, by both.
        delays: the delays of the event loop.
        excused_checks: the number of failed health checks that did not count, by reason (`mass_failure.py`).
        listeners: the callbacks for changes of the fleet (`subscribe`).
        protocols: the hand-off protocol of each group.
        ready_by_fallback: whether a group is ready before a hand-off has worked, where decode can serve without one.
        before_choice: called before backends are compared by their load, where there are other workers.
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
                    backend = self.add(url, role, group.name)
                    backend.needs_slow_start = False  # all of them begin with the gateway

    def __iter__(self) -> Iterator[Backend]:
        for pool in self._pools.values():
            yield from pool

    def pool(self, role: Role) -> list[Backend]:
        """The members of a pool, whether up or not."""
        return self._pools[role]

    def candidates(self, role: Role, model: str | None, tokens: int | None = None) -> list[Backend]:
        """The members of a pool that may be given a request for `model` now.

        Arguments:
            tokens: the tokens of the leg. Members whose bounds it would exceed are left out, where others have
                capacity. Where none has, admission admits no new request, and a request that tries again goes to a full
                backend.
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
        """The members of a pool that are up and take requests for `model`, whether fit or not."""
        return [
            b
            for b in self._pools[role]
            if b.up and not b.draining and (model is None or b.models is None or model in b.models)
        ]

    def members(self, role: Role, model: str | None) -> int:
        """The number of members of a pool that take requests for `model`, whether up or not."""
        return sum(not b.draining and b.serves(model) for b in self._pools[role])

    def _peers(self, backend: Backend) -> list[Backend]:
        """The other backends of a pool and group that are up and have one of this backend's models."""
        models = backend.models
        return [
            b
            for b in self._pools[backend.role]
            if b is not backend
            and b.up
            and not b.draining
            and b.group == backend.group  # other groups may have other hardware
            and (models is None or b.models is None or not models.keys().isdisjoint(b.models))
        ]

    def configured(self, model: str | None) -> Mapping[str, int]:
        """The number of backends of each role that take requests for `model`, up or not; with one group, of all."""
        if len(self.groups) == 1:
            return self.sizes
        return {role: sum(b.serves(model) for b in pool) for role, pool in self._pools.items()}

    def pairer(self, model: str | None) -> Callable[[Backend, Backend], bool] | None:
        """A function that says whether a prefill backend may hand over to a decode backend for `model`; None where
        every pair is possible."""
        return None if self.pairing.uniform else partial(self.pairing.pairs, model=model)

    def has_capacity(self, role: Role, model: str | None, tokens: int) -> bool | None:
        """Whether a candidate for `model` has capacity for a leg of so many tokens; None where there is no candidate.
        Like `candidates`, but stops at the first one that has."""
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
        """Have `on_capacity` called whenever there may be new capacity: when a lease was released, or a pool
        changed."""
        self._on_capacity = on_capacity
        for backend in self:
            backend.on_freed = on_capacity

    def _capacity_changed(self) -> None:
        if self._on_capacity is not None:
            self._on_capacity()

    def knows(self, model: str) -> bool:
        """Whether a backend that answers clients serves `model`, or has not listed its models."""
        for pool in (self._pools["decode"], self._pools["mixed"]):
            for backend in pool:
                if backend.models is None or model in backend.models:
                    return True
        return False

    def names(self, model: str) -> bool:
        """Whether a backend has listed `model`."""
        for pool in self._pools.values():
            for backend in pool:
                if backend.models is not None and model in backend.models:
                    return True
        return False

    def routes(self) -> frozenset[str]:
        """The routes of all engine families of the backends."""
        kinds = {backend.kind.name: backend.kind for backend in self}
        return frozenset().union(*(kind.routes for kind in (kinds or self._kinds).values()))

    def model_cards(self) -> list[dict[str, Any]]:
        """The models of the backends that answer clients, as /v1/models shows them. The context length is the shortest
        of all backends, prefill included."""
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
        """The state of a backend for new requests."""
        if backend.draining:
            return "draining"
        if not backend.up:
            return "down"
        if self.outlier_detector.ejected_for(backend):
            return "ejected"
        return "up" if backend.slow_since is None else "slow_start"

    # Membership

    def find(self, url: str, role: Role) -> Backend | None:
        """The backend with this URL and role, or None."""
        return next((b for b in self._pools[role] if b.url == url), None)

    def add(self, url: str, role: Role, group: str = DEFAULT_GROUP) -> Backend:
        """Add a backend to a group. One that is there but draining or leaving serves again."""
        if backend := self.find(url, role):
            self.undrain(backend)
            return backend
        speeds = join_pool(self.speeds.setdefault((role, group), PoolSpeeds()))
        backend = Backend(url, role, kind=self._kinds[group], window=self._window, speeds=speeds)
        backend.group = group
        backend.locate(self.configured_coordinates(url))
        backend.needs_slow_start = True  # it needs a slow start, since the others have warm caches
        if role != "encode":
            bounds = self._prefill_bounds if role == "prefill" else self._decode_bounds
            backend.most_requests, backend.most_tokens = bounds
        backend.on_freed = self._on_capacity
        self._pools[role].append(backend)
        self.sizes[role] += 1
        self._regroup(group)
        self.listeners.join(backend)
        return backend

    def configured_coordinates(self, url: str) -> Coordinates:
        """A backend's coordinates by the settings."""
        host, location = urlsplit(url).hostname or "", self._locations.get(url)
        if location is None:
            return Coordinates(host=host)
        return Coordinates(
            host=location.host or host,
            **{name: getattr(location, name) for name in Coordinates.__struct_fields__ if name != "host"},
        )

    def drain(self, backend: Backend) -> None:
        """Send a backend no new requests. Those that it has go on to their end."""
        if not backend.draining:
            log.info("%s backend %s is draining", backend.role, backend.url)
        backend.set_duty(Event.DRAIN)
        self._capacity_changed()

    def undrain(self, backend: Backend) -> None:
        """Send a draining or leaving backend requests again."""
        if backend.draining:
            log.info("%s backend %s is no longer draining", backend.role, backend.url)
        backend.set_duty(Event.UNDRAIN)
        backend.attention.set()  # it may have been put to sleep meanwhile
        self._capacity_changed()
        self._fits(backend)

    def remove(self, url: str, role: Role) -> bool:
        """Drain a backend, and remove it once its last leg has ended and no pending hand-off can be read from it.

        Returns whether there was such a backend.
        """
        backend = self.find(url, role)
        if backend is None:
            return False
        self.drain(backend)
        backend.set_duty(Event.REMOVE)
        self.forget_idle()
        return True

    def forget_idle(self) -> None:
        """Remove the backends that are leaving and drained. Called after removals and by the prober."""
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

    # Results of requests

    def failed(self, backend: Backend, error: BackendError, leg: LegName, handoff_from: Backend | None = None) -> None:
        """Handle the failure of a leg.

        A backend that cannot be reached is marked down until its prober finds it up, unless the event loop stood still.
        A backend whose engine says that it is leaving is ejected at once. All other failures go to the outlier
        detector.

        Arguments:
            handoff_from: the prefill backend of the hand-off that a decode leg came with. Where it is down, the failure
                is not counted against the decode backend, which could not read the KV cache. Where it seems up, its
                prober checks it.
        """
        if not error.blame or not backend.up:
            return
        if isinstance(error, BackendUnreachable):
            if self.delays.since(self._clock() - _LOOK_BACK) >= _STOOD_STILL:
                backend.attention.set()  # the delay may have caused the failure, so its prober decides
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
        if not isinstance(error, BackendBusy):  # an engine that says that it is busy is alive
            backend.attention.set()
            backend.learn(None)  # the engine may have been restarted as another one

    def timed(self, backend: Backend, leg: LegName, seconds: float, tokens: int) -> None:
        """Note how long a successful leg took.

        Arguments:
            seconds: for prefill the time of the whole leg; for decode the mean time for each token of a stream.
            tokens: for prefill the tokens that were computed, without cached ones; for decode those of the output.
        """
        if self.sizes[backend.role] >= FEWEST:  # of two backends, neither can be called the outlier
            self.outlier_detector.timed(backend, leg, seconds, tokens)

    def paced(self, backend: Backend, seconds: float) -> None:
        """Note the recent mean gap between the tokens of a stream whose client has read as fast as they came."""
        backend.speeds.stepped(
            seconds,
            backend.inflight_requests + backend.elsewhere_requests,
            backend.inflight_tokens + backend.elsewhere_tokens,
            self._clock(),
        )

    # Results of probes

    def set_cache(self, backend: Backend, cache: Cache) -> None:
        """Note what an engine reports of its KV cache."""
        backend.speeds.capacity = cache.tokens or inf
        self.listeners.cache(backend, cache)

    def lost_cache(self, backend: Backend) -> None:
        """Note that an engine's prefix cache is empty: it was reset, or the engine may have been restarted."""
        self.listeners.lost_cache(backend)

    def set_models(self, backend: Backend, models: dict[str, dict[str, Any]] | None, version: str) -> None:
        """Note the models and the version that an engine reports.

        Arguments:
            models: its model cards by id; None where it did not list any.
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
        """Find the connectors and the possible pairs of a group anew, since a member has changed."""
        for backend in self.protocols.settle(group, [b for b in self if b.group == group]):
            if backend.up and backend.role == "prefill":  # its coordinates have to be asked for before it hands over
                reason = f"is probed again: it speaks {backend.connector or 'no known hand-off protocol'}"
                self.take_out(backend, reason, Event.CONNECTOR_CHANGED)
        self.pairing.refresh(self)

    def lost_model(self, backend: Backend, model: str) -> None:
        """Note that an engine has refused a request for a model that it had, such as an adapter that was unloaded."""
        if backend.models is not None and model in backend.models:
            log.info("%s backend %s does not have %s any more", backend.role, backend.url, model)
            self.set_models(
                backend, {name: card for name, card in backend.models.items() if name != model}, backend.version
            )
        backend.attention.set()  # its prober asks for its models again

    def take_out(self, backend: Backend, reason: str, event: Event = Event.PROBE_FAILED) -> None:
        """Mark a backend down. Its prober marks it up again."""
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
        returns = backend.was_up
        backend.mark_up()
        self.outlier_detector.returned(backend)
        backend.speeds.returned(self._clock())
        if returns:  # not for a new one, to which other workers may have sent prompts already
            self.lost_cache(backend)
        self._capacity_changed()
        self.listeners.up(backend)
