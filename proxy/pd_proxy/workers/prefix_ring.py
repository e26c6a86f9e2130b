"""What the workers of one gateway tell each other of the engines' prefix caches: a ring of memory for each worker.

Each worker writes what it enters into its own index, and reads what the others have written when it is about to place a
request, so that each places as if it had sent every prompt itself. Nothing is locked: a ring has one writer, which
announces how far it will write, writes, and then says how far it has written. A reader that was overtaken begins again
at the oldest whole record, and has merely missed some. Each record begins with its own place, so that what is read of a
record that was never finished, or that memory shows late, is not taken for one.

Invariant: a worker that has ended is wiped by its supervisor before another takes its place. What it has entered stays:
the engines have it still.
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
_CELLS = 1 << 16  # of a ring: half a megabyte, or some thousand prompts of 4,096 tokens
_AHEAD, _END, _START = 0, 1, 2  # where a ring says how far it will write, has written, and still has
_HEAD = 4  # cells before a ring's records
_RECORD = 4  # cells before a record's hashes: its place; kind and length; engine; scale, or tokens
_MOST_HASHES = 2048  # of one record: a prompt of text beyond 64 MB has no more, and of a longer one the start will do
_MOST_READ = 1 << 13  # cells of a ring that are read at a time; the rest is read before the next request
_TRIES = 3  # readings of one ring that a writer may spoil

_TEXT, _IDS, _TRIM = 1, 2, 3


class PrefixRings:
    """The rings, made before the workers are forked.

    Arguments:
        workers: how many there are.
        cells: of each ring; a power of two.
    Attributes:
        key: of the chains' hashes (`prefix/chain.py`), which all workers share.
    """

    def __init__(self, workers: int, cells: int = _CELLS) -> None:
        self.workers = workers
        self.key = secrets.token_bytes(16)
        self.size = cells
        self._width = _HEAD + cells
        self._cells = memoryview(mmap.mmap(-1, workers * self._width * _CELL)).cast("q")

    def write(self, worker: int, kind: int, engine: int, value: int, hashes: tuple[int, ...]) -> None:
        """Add a record to a worker's own ring."""
        cells, size, head = self._cells, self.size, worker * self._width
        hashes = hashes[: min(_MOST_HASHES, size // 4)]
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
        """How far a worker has written."""
        return self._cells[worker * self._width + _END]

    def start(self, worker: int) -> int:
        """Where the oldest record begins that a ring still has."""
        return self._cells[worker * self._width + _START]

    def read(self, worker: int, place: int) -> tuple[int, array[int]]:
        """Some records of a worker's ring, from a place on; and the place where they begin, which is a later one where
        the writer has overtaken the reader."""
        cells, size, head = self._cells, self.size, worker * self._width
        first = head + _HEAD
        for _ in range(_TRIES):
            start, end = cells[head + _START], cells[head + _END]
            if not start <= place <= end:
                place = start
            count = min(end - place, _MOST_READ, size)
            at = place % size
            fits = min(count, size - at)
            found = array("q", cells[first + at : first + at + fits].tobytes())
            if fits < count:
                found.frombytes(cells[first : first + count - fits].tobytes())
            if cells[head + _AHEAD] - place <= size:
                return place, found
        return cells[head + _END], array("q")

    def wipe(self, worker: int) -> None:
        """A worker has ended, perhaps while it wrote."""
        head = worker * self._width
        self._cells[head + _AHEAD] = self._cells[head + _END]


class PeerPrefixes:
    """One worker's dealings with the rings: writes what its index learns, and enters what the others have written.

    A worker that takes the place of another begins with what the rings still have, that of the other among it.

    Arguments:
        worker: its number.
        index: its own, whose journal this becomes.
    Attributes:
        lost: cells of the rings that were overwritten before they were read.
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
        scale = unpack("<q", pack("<d", chain.scale))[0]
        self._rings.write(self._worker, _IDS if chain.exact else _TEXT, self._key(engine), scale, chain.hashes)

    def trimmed(self, engine: str, tokens: int) -> None:
        self._rings.write(self._worker, _TRIM, self._key(engine), tokens, ())

    def look(self) -> None:
        """Enter what the others have written since the last look. Costs a step for each worker while there is
        nothing."""
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
            if cells[at] != begins + at or length > _RECORD + _MOST_HASHES:
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
