"""Writes log lines to standard error: a bounded queue, and a thread that writes its lines.

The reader of standard error may be slow, stopped or gone. The event loop, signal handlers and the end of the process
never wait for it: lines that do not fit into the queue are dropped and counted.
"""

from __future__ import annotations

import logging
import os
import select
import sys
from logging.handlers import QueueHandler
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic, sleep
from weakref import WeakSet

LIMIT = 4 * 1024 * 1024
"""Bytes of lines that may wait: about ten thousand lines, which the busiest gateway writes in a second."""

_ATOMIC = 4096  # bytes that Linux writes to a pipe in one piece (PIPE_BUF): lines of several workers do not mix
_REST = 0.005  # seconds between two writes, so that the thread does not take the interpreter lock for each line
_AGAIN = 1.0  # seconds between two lines that report how many were dropped
_LAST_WORDS = 2.0  # seconds to write the waiting lines at the end of the process, while they are read
_NO_READER = 0.3  # seconds without progress after which standard error counts as not read

_live: WeakSet[LogQueue] = WeakSet()


class LogQueue(QueueHandler):
    """A logging handler that never waits. The caller formats the lines, and a thread writes them.

    The thread starts with the first line, in each process, since a fork has none of its parent's threads.

    Arguments:
        descriptor: of the file to write to; None where there is no file: all lines are dropped then.
        limit: bytes of lines that may wait.
    Attributes:
        dropped: lines that were not written, since the queue was full or the file refused them.
    """

    queue: SimpleQueue[bytes]

    def __init__(self, formatter: logging.Formatter, descriptor: int | None, limit: int = LIMIT) -> None:
        super().__init__(SimpleQueue())
        self.setFormatter(formatter)
        self._descriptor = descriptor
        self._limit = limit
        self._begin()
        _live.add(self)

    def _begin(self) -> None:
        """Set the state of an empty queue without a thread."""
        self.queue = SimpleQueue()
        self._thread: Thread | None = None
        # One counter for each side, so that no lock is needed: a lock could be held at a fork, or by an interrupted
        # frame of the same thread.
        self._put = 0  # bytes; changed with the handler's lock held
        self._done = 0  # bytes; changed by the writer alone
        self._full = 0  # lines
        self._refused = 0  # lines; changed by the writer alone

    @property
    def dropped(self) -> int:
        return self._full + self._refused

    # The caller's side

    def prepare(self, record: logging.LogRecord) -> bytes:
        return self.format(record).encode("utf-8", "backslashreplace") + b"\n"

    def enqueue(self, record: bytes) -> None:  # type: ignore[override]  # what `prepare` made
        size = len(record)
        if self._descriptor is None or self._put - self._done + size > self._limit:
            self._full += 1
            return
        if self._thread is None:
            # The thread may run much later, but it reports every line that is dropped from here on.
            arguments = (self.queue, self.dropped)
            self._thread = Thread(target=self._write_on, args=arguments, name="log-writer", daemon=True)
            self._thread.start()
        self._put += size
        self.queue.put(record)

    def handleError(self, record: logging.LogRecord) -> None:
        self._full += 1  # logging's own handler would write to standard error, and wait for its reader

    def flush(self) -> None:
        """Wait until all lines are written, at most two seconds, and only while standard error is read."""
        end = monotonic() + _LAST_WORDS
        done, since = self._done, monotonic()
        while self._done < self._put and (now := monotonic()) < end:
            if self._done != done:
                done, since = self._done, now
            elif now - since > _NO_READER:
                return
            sleep(_REST)

    def close(self) -> None:
        """Stop writing. Lines that are still waiting are lost."""
        self._descriptor = None
        self.queue.put(b"")  # the writer may wait for a line
        super().close()

    # The writer's side

    def _write_on(self, lines: SimpleQueue[bytes], reported: int) -> None:
        when = 0.0
        rest = b""  # a line that did not fit into the last piece
        while self._descriptor is not None:
            piece, count = rest or lines.get(), 1
            rest = b""
            while len(piece) < _ATOMIC:
                try:
                    line = lines.get_nowait()
                except Empty:
                    break
                if len(piece) + len(line) > _ATOMIC:
                    rest = line
                    break
                piece += line
                count += 1
            written = self._write(piece)
            if not written:
                self._refused += count
            elif self.dropped > reported and monotonic() - when > _AGAIN:
                missing, reported, when = self.dropped - reported, self.dropped, monotonic()
                self._write(self._notice(missing))
            self._done += len(piece)
            sleep(_REST if lines.empty() else 0)

    def _write(self, piece: bytes) -> bool:
        """Write a piece. Returns whether all of it was written."""
        left = memoryview(piece)
        while left:
            if (descriptor := self._descriptor) is None:
                return False
            try:
                left = left[os.write(descriptor, left) :]
            except BlockingIOError:  # another process that shares the file has made it non-blocking
                writable = select.poll()
                writable.register(descriptor, select.POLLOUT)
                writable.poll()
            except OSError:  # the reader has gone, or the disk is full
                return False
        return True

    def _notice(self, missing: int) -> bytes:
        text = "%d line(s) of this log were dropped: standard error is not read, or not fast enough"
        record = logging.LogRecord("pd_proxy.log", logging.WARNING, __file__, 0, text, (missing,), None)
        return self.prepare(record)


def lines_dropped() -> int:
    """The number of lines that this process has dropped."""
    return sum(queue.dropped for queue in _live)


def standard_error() -> int | None:
    """The descriptor of standard error. None where the process has no standard error: descriptor 2 may then be another
    file, such as a client's socket."""
    if sys.stderr is None:
        return None
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError):
        return None


def _after_fork() -> None:
    for queue in list(_live):
        queue._begin()


os.register_at_fork(after_in_child=_after_fork)
