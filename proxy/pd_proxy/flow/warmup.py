"""Sends one small request through each new pair of backends.

It saves clients the time of the engines' first handshake, and shows whether the pair can hand over at all.

A backend that comes up is paired with at most eight backends of the other role, and at most four such requests run at a
time. A fleet of 50 and 50 that starts at once so gets some 800 requests of one token, four at a time, instead of 2,500
together. All other pairs are warmed up by their first real request. No client's request waits for a warm-up, but
`/ready` answers 503 until the first pair of a group has handed over.

A pair that fails is tried again at growing intervals: without end while one of its backends has never handed over, as
its engine may still be starting or be repaired; else a few times. Both backends keep the result. It is logged as a
warning where it is new for one of them, so a fleet whose pairs all fail for one reason logs one line for each backend.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from time import monotonic

from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.findings import NEVER, Finding, HandoffState
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.zmq.notifications import TransferNotifications
from pd_proxy.flow.callbacks import Callbacks
from pd_proxy.flow.trial import Inspector, Trial, Trials, model_of, usable
from pd_proxy.handoff.connector import Connector
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.records import RequestRecord

log = logging.getLogger("pd_proxy.flow")

_PEERS = 8  # pairs of each new backend: enough that the least loaded backend of a pool is mostly among them
_AT_ONCE = 4
_FIRST_WAIT = 1.0  # seconds before a pair that failed is tried again; doubled each time
_LONGEST_WAIT = 60.0
_TRIES = 5  # of a pair whose backends have both handed over, but not to each other

Pair = tuple[str, str]


class Warmup:
    """Warms up pairs while it runs. It is a sink of request records, which show the pairs that are warm already."""

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        connectors: Mapping[str, Connector],
        notices: TransferNotifications,
        callbacks: Callbacks | None = None,
    ) -> None:
        self._on = settings.warmup
        self._fleet = fleet
        self._trials = Trials(settings, fleet, connectors, notices, callbacks)
        self._warm: set[Pair] = set()
        self._waiting: dict[Pair, tuple[Backend, Backend]] = {}  # of new backends
        self._due: dict[Pair, tuple[Backend, Backend]] = {}  # to be tried again now
        self._timers: dict[Pair, asyncio.TimerHandle] = {}
        self._tries: Counter[Pair] = Counter()
        self._warned: set[tuple[str, str]] = (
            set()
        )  # URLs of backends, and the codes of the findings that were logged for them
        self._workers: set[asyncio.Task[None]] = set()
        self._unsubscribe: Callable[[], None] = lambda: None

    def start(self, inspector: Inspector | None = None) -> None:
        """Warm up the backends that come up from now on.

        Arguments:
            inspector: reads how engines were started, for more exact findings.
        """
        self._trials.inspector = inspector
        if self._on:
            self._unsubscribe = self._fleet.subscribe(on_up=self._came_up, on_fit=self._queue_pairs)
            self._fleet.pairs_are_tried = True

    async def stop(self) -> None:
        """Cancel everything that runs."""
        self._unsubscribe()
        self._waiting.clear()
        self._due.clear()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        workers = tuple(self._workers)
        for worker in workers:
            worker.cancel()
        for worker in workers:
            with suppress(asyncio.CancelledError):
                await worker
        self._trials.close()

    def forget(self, backend: Backend) -> None:
        """A backend has left the fleet."""
        self._forget_pairs(backend)
        self._trials.forget(backend)

    def finished(self, record: RequestRecord) -> None:
        """A real request has ended: the pair it went through is warm."""
        if not (self._on and record.prefill and record.status == 200) or record.fallback:
            return
        if record.first_token_reason == "whole" or record.outcome != "ok" or record.resumes:
            return
        pair = record.prefill, record.decode
        if pair in self._warm:
            return
        prefill, decode = self._fleet.find(record.prefill, "prefill"), self._fleet.find(record.decode, "decode")
        if prefill is None or decode is None:
            return
        ignored = decode.handoff.finding
        if ignored is not None and ignored.code == "not_read" and ignored.severity == "fault":
            return  # such an engine ignores hand-offs, and answers without them too
        self._worked(prefill, decode, monotonic())

    def _forget_pairs(self, backend: Backend) -> None:
        """Forget the pairs of a backend: another engine may be at its address now."""
        known = {other.url for other in self._fleet}

        def gone(pair: Pair) -> bool:
            return backend.url in pair or not known.issuperset(pair)

        self._warm = {pair for pair in self._warm if not gone(pair)}
        for pair in [pair for pair in self._tries if gone(pair)]:
            del self._tries[pair]
        for pair in [pair for pair in self._timers if gone(pair)]:
            self._timers.pop(pair).cancel()
        self._warned = {said for said in self._warned if said[0] != backend.url and said[0] in known}
        self._trials.suspect(backend)

    def _came_up(self, backend: Backend) -> None:
        self._forget_pairs(backend)
        backend.handoff = NEVER
        self._queue_pairs(backend)

    def _queue_pairs(self, backend: Backend) -> None:
        """Queue the pairs of a backend that have not been tried."""
        if backend.role in ("mixed", "encode") or not usable(backend):
            return
        own = self._fleet.pool(backend.role)
        pool = self._fleet.pool("decode" if backend.role == "prefill" else "prefill")
        others = [b for b in pool if usable(b) and b.group == backend.group]
        first = own.index(backend) * _PEERS  # so that backends that come up together get different peers
        for number in range(min(_PEERS, len(others))):
            other = others[(first + number) % len(others)]
            prefill, decode = (backend, other) if backend.role == "prefill" else (other, backend)
            pair = prefill.url, decode.url
            if pair not in self._warm and pair not in self._tries and self._may_pair(prefill, decode):
                self._waiting[pair] = (prefill, decode)
        self._start_workers()

    def _may_pair(self, prefill: Backend, decode: Backend) -> bool:
        model = model_of(prefill, decode)
        return model is not None and self._fleet.pairing.pairs(prefill, decode, model or None)

    def _start_workers(self) -> None:
        for _ in range(min(_AT_ONCE - len(self._workers), len(self._waiting) + len(self._due))):
            worker = asyncio.create_task(self._work(), name="warm-up")
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)

    async def _work(self) -> None:
        while queue := self._waiting or self._due:
            pair = next(iter(queue))
            prefill, decode = queue.pop(pair)
            if pair in self._warm or not (usable(prefill) and usable(decode) and self._may_pair(prefill, decode)):
                continue
            try:
                trial = await self._trials.run(prefill, decode)
            except Exception:
                log.exception(
                    "warming up %s and %s failed", *pair
                )  # a defect of the gateway; requests are served without it
                self._plan_another(prefill, decode)
                continue
            self._fleet.warmups["ok" if trial.finding is None else trial.finding.code] += 1
            if trial.finding is None:
                self._worked(prefill, decode, trial.at, trial.warnings)
            elif pair not in self._warm:  # no request has got through meanwhile
                self._failed(prefill, decode, trial)

    def _worked(self, prefill: Backend, decode: Backend, at: float, warnings: Sequence[Finding] = ()) -> None:
        """A hand-off of a pair has worked.

        Arguments:
            warnings: what is odd about its engines all the same.
        """
        pair = prefill.url, decode.url
        self._warm.add(pair)
        for backend, peer in ((prefill, decode), (decode, prefill)):
            if backend.handoff.state == "failed" or not backend.handed_over:
                say = log.info if backend.handoff.state == "failed" else log.debug
                say("%s backend %s hands over with %s", backend.role, backend.url, peer.url)
            odd = next((finding for finding in warnings if backend.url in finding.backends), None)
            self._warned = {said for said in self._warned if said[0] != backend.url or (odd and said[1] == odd.code)}
            backend.handoff = HandoffState("ok", peer.url, at, odd)
            backend.handed_over = True
        for finding in warnings:
            news = {(url, finding.code) for url in finding.backends} - self._warned
            self._warned |= news
            if news:
                log.warning("%s. %s", finding.what, finding.advice)
        self._tries.pop(pair, None)
        if timer := self._timers.pop(pair, None):
            timer.cancel()

    def _failed(self, prefill: Backend, decode: Backend, trial: Trial) -> None:
        """A trial of a pair has failed: say so, and plan the next."""
        finding, pair = trial.finding, (prefill.url, decode.url)
        assert finding is not None
        news = {(url, finding.code) for url in pair} - self._warned
        self._warned |= news
        log.log(
            logging.WARNING if news else logging.DEBUG,
            "the hand-off does not work between %s. %s",
            finding.what,
            finding.advice,
        )
        prefill.handoff = HandoffState("failed", decode.url, trial.at, finding)
        decode.handoff = HandoffState("failed", prefill.url, trial.at, finding)
        self._plan_another(prefill, decode)

    def _plan_another(self, prefill: Backend, decode: Backend) -> None:
        """Have a pair that failed tried again, later each time."""
        pair = prefill.url, decode.url
        self._tries[pair] += 1
        if prefill.handed_over and decode.handed_over and self._tries[pair] >= _TRIES:
            return
        wait = min(_FIRST_WAIT * 2.0 ** min(self._tries[pair] - 1, 16), _LONGEST_WAIT)
        wait *= 1 - random.random() / 4
        loop = asyncio.get_running_loop()
        self._timers[pair] = loop.call_later(wait, self._again, prefill, decode)

    def _again(self, prefill: Backend, decode: Backend) -> None:
        pair = prefill.url, decode.url
        self._timers.pop(pair, None)
        if pair not in self._warm:
            self._due[pair] = (prefill, decode)
            self._start_workers()
