"""Server-sent events: finding where they end, and what they carry.

Invariant: whatever way the bytes are split, the blocks that `EventReader.feed` returns are the input in order,
each ending where an event ends. So a client only ever sees whole events, and an error event can follow at any
moment without landing in the middle of another.

Line ends may be LF, CRLF or CR (https://html.spec.whatwg.org/multipage/server-sent-events.html); engines use LF,
and only that path is made fast.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from proxy.errors import BackendGarbled

# An event ends with an empty line: two line ends in a row. A CR that is last in the buffer may be half of a CRLF, so
# it only counts once the next byte is there.
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?=[^\n]))(?:\r\n|\n|\r(?=[^\n]))+")
_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventReader:
    """Cuts a byte stream into blocks of whole events.

    Arguments:
        limit: bytes that one event may have before `BackendGarbled` is raised.
    """

    __slots__ = ("_limit", "_tail")

    def __init__(self, limit: int = 16 * 1024 * 1024) -> None:
        self._limit = limit
        self._tail = b""

    def feed(self, data: bytes) -> bytes:
        """Add bytes; return all whole events that are there now (empty when none is)."""
        if self._tail:
            data = self._tail + data
            self._tail = b""
        if data.endswith(b"\n\n"):
            return data
        cut = data.rfind(b"\n\n") + 2
        if b"\r" in data:
            cut = 0
            for end in _EVENT_END.finditer(data):
                cut = end.end()
        if cut < 2:
            cut = 0
        self._tail = data[cut:]
        if len(self._tail) > self._limit:
            raise BackendGarbled(f"an event of more than {self._limit} bytes")
        return data[:cut]

    def rest(self) -> bytes:
        """What came after the last whole event: an event that was cut short, or nothing."""
        return self._tail


def split(block: bytes) -> Iterator[bytes]:
    """The events of a block, each with its line ends, as it came."""
    start = 0
    for end in _EVENT_END.finditer(block + b"\n") if b"\r" in block else re.finditer(rb"\n\n+", block):
        stop = min(end.end(), len(block))
        yield block[start:stop]
        start = stop
    if start < len(block):
        yield block[start:]


def payload(event: bytes) -> bytes:
    """The `data` of one event: its data lines joined by LF; empty for comments and keep-alives."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2:
        return event[6:-2]
    lines = []
    for line in _LINE_END.split(event):
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value[1:] if value.startswith(b" ") else value)
    return b"\n".join(lines)
