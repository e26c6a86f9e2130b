"""The load of all workers of one gateway, in a page of memory that they share.

Each worker writes what it has in flight on each backend whenever that changes, and reads what the others have when it
is about to place a request, so that each places requests as if all of them were its own. An idle worker does not read:
to wake a process a hundred times a second costs as much as seven hundred tokens. Only the allocation of rows is locked:
each number has one writer, and is written whole.

Invariant: a worker that has ended is wiped by its supervisor before another takes its place, so that nothing of it is
counted for ever.
"""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import multiprocessing
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from math import inf
from time import monotonic

from pd_proxy.fleet.backend import Backend

_FRESH = 0.005  # seconds for which what was read will do; a backend's load changes by a request in that time
_TICK = 0.01  # seconds between looks while a request waits for capacity
_PAUSE = 0.5  # and while none does
_ROWS = 1024  # backends that have been there since the start; those beyond are each worker's own business
_KEY = 8  # bytes of a backend's digest; 0 is a free row
_NUMBERS = 4  # requests, tokens, tokens to prefill, since when (microseconds)
_MICRO = 1e6
_LOCK_TIMEOUT = 1.0  # seconds; a worker that died with the lock has left at most one row without its key


class LoadTable:
    """The page, made before the workers are forked.

    Arguments:
        workers: how many there are.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._width = 1 + workers * _NUMBERS
        self._cells = memoryview(mmap.mmap(-1, _ROWS * self._width * 8)).cast("q")
        self._lock = multiprocessing.get_context("fork").Lock()

    def row(self, backend: Backend) -> int:
        """Where a backend's numbers begin; -1 when the page is full."""
        digest = hashlib.blake2b(f"{backend.role} {backend.url}".encode(), digest_size=_KEY).digest()
        key = int.from_bytes(digest, "little", signed=True) or 1
        held = self._lock.acquire(timeout=_LOCK_TIMEOUT)
        try:
            for step in range(_ROWS):
                start = (key + step) % _ROWS * self._width
                if self._cells[start] in (0, key):
                    self._cells[start] = key
                    return start + 1
            return -1
        finally:
            if held:
                self._lock.release()

    def write(self, row: int, worker: int, requests: int, tokens: int) -> None:
        place = row + worker * _NUMBERS
        self._cells[place] = requests
        self._cells[place + 1] = tokens

    def write_uncached(self, row: int, worker: int, tokens: int, since: float) -> None:
        place = row + worker * _NUMBERS
        self._cells[place + 2] = tokens
        self._cells[place + 3] = int(since * _MICRO) if since > 0.0 else 0

    def others(self, row: int, worker: int) -> tuple[int, int, int, float]:
        """Requests, tokens and tokens to prefill of all workers but one; and since when the first of the last has been
        computed, or when it ended."""
        cells, end, own = self._cells, row + self.workers * _NUMBERS, row + worker * _NUMBERS
        instants = cells[row + 3 : end : _NUMBERS].tolist()
        instants[worker] = 0
        return (
            sum(cells[row:end:_NUMBERS]) - cells[own],
            sum(cells[row + 1 : end : _NUMBERS]) - cells[own + 1],
            sum(cells[row + 2 : end : _NUMBERS]) - cells[own + 2],
            max(instants) / _MICRO,
        )

    def wipe(self, worker: int) -> None:
        """A worker has ended, and everything that it had in flight with it."""
        for row in range(1, _ROWS * self._width, self._width):
            self.write(row, worker, 0, 0)
            self.write_uncached(row, worker, 0, 0.0)


class LoadSync:
    """One worker's access to the table: publishes its own load, and reads that of the others.

    Arguments:
        worker: its number.
        on_freed: called when a backend has become less loaded by what another worker does.
        on_read: called before each read.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        table: LoadTable,
        worker: int,
        fleet: Iterable[Backend],
        on_freed: Callable[[], object],
        on_read: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._table = table
        self._worker = worker
        self._fleet = fleet
        self._on_freed = on_freed
        self._on_read = on_read
        self._clock = clock
        self._read_at = -inf
        self._rows: dict[Backend, int] = {}
        self._awaited = asyncio.Event()

    async def run(self, waiting: Callable[[], int]) -> None:
        """Look now and then, for ever, since no request may be placed here that would: one that waits may get room by
        what the others do, and a backend that drains is drained by it.

        Arguments:
            waiting: returns how many requests wait for capacity. Call `wake` when the first one begins to wait.
        """
        while True:
            self._awaited.clear()
            if waiting():
                await asyncio.sleep(_TICK)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PAUSE):
                        await self._awaited.wait()
            self.read()

    def wake(self) -> None:
        """A request has begun to wait: read the table more often."""
        self._awaited.set()

    def refresh(self) -> None:
        """Read the table, unless that was done in the last 5 ms."""
        if self._clock() - self._read_at > _FRESH:
            self.read()

    def read(self) -> None:
        """Learn what the other workers have in flight. From a backend's first look on, they are told of each of its
        leases here."""
        table, worker, rows, freed = self._table, self._worker, self._rows, False
        self._read_at = self._clock()
        self._on_read()
        for backend in self._fleet:
            row = rows.get(backend)
            if row is None:
                row = rows[backend] = table.row(backend)
                if row >= 0:
                    backend.tell = partial(table.write, row, worker)
                    backend.tell(backend.inflight_requests, backend.inflight_tokens)
                    backend.tell_uncached = partial(table.write_uncached, row, worker)
                    backend.tell_uncached(backend.speeds.outstanding, backend.speeds.since)
            if row < 0:
                continue
            requests, tokens, uncached, since = table.others(row, worker)
            backend.speeds.told_elsewhere(uncached, since)
            freed = freed or requests < backend.elsewhere_requests
            backend.elsewhere_requests, backend.elsewhere_tokens = requests, tokens
        if freed:
            self._on_freed()

    def forget(self, backend: Backend) -> None:
        """A backend has left."""
        backend.tell = backend.tell_uncached = None
        row = self._rows.pop(backend, -1)
        if row >= 0:
            self._table.write(row, self._worker, 0, 0)
            self._table.write_uncached(row, self._worker, 0, 0.0)
