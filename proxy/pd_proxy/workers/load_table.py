"""The load table: what each worker of a gateway has in flight on each backend, in memory that all workers share.

A worker writes its numbers whenever they change, and reads those of the other workers before it places a request. So
each worker places requests by the load of the whole gateway. An idle worker reads only twice a second, since waking a
process a hundred times a second costs as much as seven hundred tokens.

Only the allocation of rows is locked. Each number has one writer, and is written in one step.

Invariant: the supervisor wipes the numbers of a worker that has ended before it starts its replacement.
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

_FRESH = 0.005  # seconds for which a reading is used again; a backend's load changes by about one request in that time
_TICK = 0.01  # seconds between readings while a request waits for capacity
_PAUSE = 0.5  # seconds between readings while no request waits
_ROWS = 1024  # backends that were ever added; the load on further ones is not shared between the workers
_KEY = 8  # bytes of a backend's digest; the key 0 marks a free row
_NUMBERS = 4  # for each worker: requests, tokens, tokens to prefill, and since when these are computed (microseconds)
_MICRO = 1e6
_LOCK_TIMEOUT = 1.0  # seconds; a worker that died while it held the lock has left at most one row without its key


class LoadTable:
    """The shared memory. The supervisor makes it before it forks the workers.

    Arguments:
        workers: how many workers there are.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._width = 1 + workers * _NUMBERS
        self._cells = memoryview(mmap.mmap(-1, _ROWS * self._width * 8)).cast("q")
        self._lock = multiprocessing.get_context("fork").Lock()

    def row(self, backend: Backend) -> int:
        """The index of a backend's first number; -1 when the table is full."""
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
        """Write what a worker has in flight on a backend."""
        place = row + worker * _NUMBERS
        self._cells[place] = requests
        self._cells[place + 1] = tokens

    def write_uncached(self, row: int, worker: int, tokens: int, since: float) -> None:
        """Write the tokens that a worker has a backend prefill, and since when the first of them are computed."""
        place = row + worker * _NUMBERS
        self._cells[place + 2] = tokens
        self._cells[place + 3] = int(since * _MICRO) if since > 0.0 else 0

    def others(self, row: int, worker: int) -> tuple[int, int, int, float]:
        """The sums of requests, tokens and tokens to prefill over all workers but one; and the latest of their times
        since when the first prompt is computed, or at which the last one ended."""
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
        """Set all numbers of a worker to zero, since it has ended."""
        for row in range(1, _ROWS * self._width, self._width):
            self.write(row, worker, 0, 0)
            self.write_uncached(row, worker, 0, 0.0)


class LoadSync:
    """One worker's access to the load table: writes its own load, and reads that of the other workers.

    Arguments:
        worker: this worker's number.
        on_freed: called when the other workers have fewer requests on a backend than at the last reading.
        on_read: called before each reading.
        clock: a monotonic clock, in seconds.
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
        """Read the table from time to time, for ever, also while no request is placed here.

        Other workers may free capacity for a request that waits here, or end the last request of a draining backend.

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
        """Read the table more often, since a request has begun to wait."""
        self._awaited.set()

    def refresh(self) -> None:
        """Read the table, unless it was read in the last 5 ms."""
        if self._clock() - self._read_at > _FRESH:
            self.read()

    def read(self) -> None:
        """Read what the other workers have in flight.

        The first reading of a backend also connects it to the table: from then on each change of its load in this
        worker is written there.
        """
        table, worker, rows, freed = self._table, self._worker, self._rows, False
        self._read_at = self._clock()
        self._on_read()
        for backend in self._fleet:
            row = rows.get(backend)
            if row is None:
                row = rows[backend] = table.row(backend)
                if row >= 0:
                    backend.on_load_changed = partial(table.write, row, worker)
                    backend.on_load_changed(backend.inflight_requests, backend.inflight_tokens)
                    backend.on_uncached_changed = partial(table.write_uncached, row, worker)
                    backend.on_uncached_changed(backend.speeds.outstanding, backend.speeds.since)
            if row < 0:
                continue
            requests, tokens, uncached, since = table.others(row, worker)
            backend.speeds.note_elsewhere(uncached, since)
            freed = freed or requests < backend.elsewhere_requests
            backend.elsewhere_requests, backend.elsewhere_tokens = requests, tokens
        if freed:
            self._on_freed()

    def forget(self, backend: Backend) -> None:
        """Clear a backend's numbers of this worker, since the backend was removed."""
        backend.on_load_changed = backend.on_uncached_changed = None
        row = self._rows.pop(backend, -1)
        if row >= 0:
            self._table.write(row, self._worker, 0, 0)
            self._table.write_uncached(row, self._worker, 0, 0.0)
