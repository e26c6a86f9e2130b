"""The prefix rings: a ring buffer in shared memory for each worker, by which the workers share their prefix indexes.

Each worker writes to its ring what it enters into its own index, and reads the rings of the other workers before it
places a request. So each worker knows of all prompts that the gateway has sent.

Nothing is locked, since each ring has one writer. The writer first stores how far it will write, then writes the
record, and then stores how far it has written. A reader that the writer has overtaken goes on at the oldest whole
record, and only misses some records. Each record begins with its own position in the ring. So a record that was not
finished, or whose memory is not visible yet, is not read as one.

Invariant: the supervisor resets the ring of a worker that has ended before it starts its replacement. The records stay,
since the engines still have the prompts.
"""

from __future__ import annotations

import mmap
import secrets
from array import array
from hashlib import blake2b
from struct import pack, unpack

from pd_proxy.prefix.blocks import IDS, TEXT
from pd_proxy.prefix.chain import Chain
from pd_proxy.prefix.index import PrefixIndex

_CELL = 8  # bytes
_CELLS = 1 << 16  # cells of a ring: half a megabyte, or about a thousand prompts of 4,096 tokens
_AHEAD, _END, _START = 0, 1, 2  # header cells: the end announced, the end written, the oldest record
_HEAD = 4  # cells of a ring's header
_RECORD = 4  # cells of a record's header: its position; kind and length; engine; scale, or tokens
_MAX_HASHES = 2048  # of one record; only text of more than 64 MB has more, of which the beginning is enough
_MAX_READ = 1 << 13  # cells that are read from a ring at a time; the rest is read before the next request
_TRIES = 3  # readings of one ring, each of which the writer may overtake

_TEXT, _IDS, _TRIM = 1, 2, 3


class PrefixRings:
    """The rings of all workers. The supervisor makes them before it forks the workers.

    Arguments:
        workers: how many workers there are.
        cells: the size of each ring; a power of two.
    Attributes:
        key: the key of the chains' hashes (`prefix/chain.py`), the same in all workers.
    """

    def __init__(self, workers: int, cells: int = _CELLS) -> None:
        self.workers = workers
        self.key = secrets.token_bytes(16)
        self.size = cells
        self._width = _HEAD + cells
        self._cells = memoryview(mmap.mmap(-1, workers * self._width * _CELL)).cast("q")

    def write(self, worker: int, kind: int, engine: int, value: int, hashes: tuple[int, ...]) -> None:
        """Append a record to a worker's own ring."""
        cells, size, head = self._cells, self.size, worker * self._width
        hashes = hashes[: min(_MAX_HASHES, size // 4)]
        place, start = cells[head + _END], cells[head + _START]
        record = array("q", (place, kind << 32 | len(hashes), engine, value, *hashes))
        end = place + len(record)
        first = head + _HEAD
        while end - start > size:
            start += _RECORD + (cells[first + (start + 1) % size] & 0xFFFFFFFF)
        cells[head + _START] = start
        cells[head + _AHEAD] = end
        at = place % size
        fits = size - at
        view = memoryview(record)
        cells[first + at : first + min(size, at + len(record))] = view[:fits]
        if fits < len(record):
            cells[first : first + len(record) - fits] = view[fits:]
        cells[head + _END] = end

    def end(self, worker: int) -> int:
        """The position up to which a worker's ring is written."""
        return self._cells[worker * self._width + _END]

    def start(self, worker: int) -> int:
        """The position of the oldest record that a worker's ring still has."""
        return self._cells[worker * self._width + _START]

    def read(self, worker: int, place: int) -> tuple[int, array[int]]:
        """Read records of a worker's ring from a position on.

        Returns the position where they begin, which is later than `place` where the writer has overtaken the reader;
        and the records.
        """
        cells, size, head = self._cells, self.size, worker * self._width
        first = head + _HEAD
        for _ in range(_TRIES):
            start, end = cells[head + _START], cells[head + _END]
            if not start <= place <= end:
                place = start
            count = min(end - place, _MAX_READ, size)
            at = place % size
            fits = min(count, size - at)
            found = array("q", cells[first + at : first + at + fits].tobytes())
            if fits < count:
                found.frombytes(cells[first : first + count - fits].tobytes())
            if cells[head + _AHEAD] - place <= size:
                return place, found
        return cells[head + _END], array("q")

    def wipe(self, worker: int) -> None:
        """Drop the unfinished record of a worker that may have ended while it wrote one."""
        head = worker * self._width
        self._cells[head + _AHEAD] = self._cells[head + _END]


class PeerPrefixes:
    """One worker's access to the rings: writes what its index learns, and enters what the other workers have written.

    A worker that replaces another reads all records that the rings still have, those of its predecessor included.

    Arguments:
        worker: this worker's number.
        index: its prefix index. This object becomes the index's journal.
    Attributes:
        lost: how many cells of the rings were overwritten before they were read.
    """

    def __init__(self, rings: PrefixRings, worker: int, index: PrefixIndex) -> None:
        self._rings = rings
        self._worker = worker
        self._index = index
        self._places = [rings.start(number) for number in range(rings.workers)]
        self._own_until = rings.end(worker)
        self._keys: dict[str, int] = {}
        self._urls: dict[int, str] = {}
        self._joins = -1
        self.lost = 0
        index.journal = self

    def entered(self, engine: str, chain: Chain) -> None:
        """Write a chain that this worker has entered (`Journal`)."""
        scale = unpack("<q", pack("<d", chain.scale))[0]
        self._rings.write(self._worker, _IDS if chain.exact else _TEXT, self._key(engine), scale, chain.hashes)

    def trimmed(self, engine: str, tokens: int) -> None:
        """Write that this worker has trimmed an engine's entries to so many tokens (`Journal`)."""
        self._rings.write(self._worker, _TRIM, self._key(engine), tokens, ())

    def read(self) -> None:
        """Enter what the other workers have written since the last call. While they have written nothing, this costs
        one comparison for each worker."""
        rings, places = self._rings, self._places
        for worker in range(rings.workers):
            place = places[worker]
            if place != rings.end(worker) and (worker != self._worker or place < self._own_until):
                self._read(worker, place)

    def _read(self, worker: int, place: int) -> None:
        begins, cells = self._rings.read(worker, place)
        self.lost += max(0, begins - place)
        at, count = 0, len(cells)
        while at + _RECORD <= count:
            length = _RECORD + (cells[at + 1] & 0xFFFFFFFF)
            if cells[at] != begins + at or length > _RECORD + _MAX_HASHES:
                self.lost += self._rings.end(worker) - begins - at
                self._places[worker] = self._rings.end(worker)
                return
            if at + length > count:
                break
            self._apply(cells, at, length)
            at += length
        self._places[worker] = begins + at

    def _apply(self, cells: array[int], at: int, length: int) -> None:
        url = self._url(cells[at + 2])
        if url is None:
            return
        kind, value = cells[at + 1] >> 32, cells[at + 3]
        if kind == _TRIM:
            self._index.trimmed_elsewhere(url, value)
            return
        blocks = IDS if kind == _IDS else TEXT
        hashes = tuple(cells[at + _RECORD : at + length])
        scale: float = unpack("<d", pack("<q", value))[0]
        if not hashes or not 0.0 < scale < 1e6:
            return
        units = blocks.ends[len(hashes) - 1]
        chain = Chain(hashes, int(units * scale), units, scale, blocks, kind == _IDS)
        self._index.entered_elsewhere(url, chain)

    def _key(self, engine: str) -> int:
        key = self._keys.get(engine)
        if key is None:
            if len(self._keys) > 2 * len(self._index.engines) + 64:  # engines that have left
                self._keys.clear()
            key = self._keys[engine] = _key_of(engine)
        return key

    def _url(self, key: int) -> str | None:
        if self._joins != self._index.joins:
            self._joins = self._index.joins
            self._urls = {self._key(engine): engine for engine in self._index.engines}
        return self._urls.get(key)


def _key_of(engine: str) -> int:
    return int.from_bytes(blake2b(engine.encode(), digest_size=_CELL).digest(), "little", signed=True)
