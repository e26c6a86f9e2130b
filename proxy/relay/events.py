"""Server-sent events: finding where they end, and what they carry.

Invariant: whatever way the bytes are split, the blocks that `EventReader.feed` returns are the input in order,
each ending where an event ends. So a client only ever sees whole events, and an error event can follow at any
moment without landing in the middle of another.

Line ends may be LF, CRLF or CR (https://html.spec.whatwg.org/multipage/server-sent-events.html); engines use LF,
and only that path is made fast.
"""

from __future__ import annotations

import re

from proxy.errors import BackendGarbled

# An event ends with an empty line: two line ends in a row. A CR that is last in the buffer may be half of a CRLF, so
# it only counts once the next byte is there.
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?=[^\n]))(?:\r\n|\n|\r(?=[^\n]))+")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_CR = ord("\r")


class EventReader:
    """Cuts a byte stream into blocks of whole events.

    Arguments:
        limit: bytes that one event may have before `BackendGarbled` is raised.
    Attributes:
        rest: what came after the last whole event: the beginning of the next, or nothing.
    """

    __slots__ = ("_limit", "rest")

    def __init__(self, limit: int = 16 * 1024 * 1024) -> None:
        self._limit = limit
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """Add bytes; return all whole events that are there now (empty when none is)."""
        if self.rest:
            data = self.rest + data
            self.rest = b""
        if data.endswith(b"\n\n"):
            return data
        cut = data.rfind(b"\n\n") + 2
        if _CR in data:
            cut = 0
            for end in _EVENT_END.finditer(data):
                cut = end.end()
        if cut < 2:
            cut = 0
        self.rest = data[cut:]
        if len(self.rest) > self._limit:
            raise BackendGarbled(f"an event of more than {self._limit} bytes")
        return data[:cut]


def split(block: bytes) -> list[bytes]:
    """The events of a block, each with its line ends."""
    if block.find(b"\n\n") == len(block) - 2 and _CR not in block:
        return [block]
    if _CR not in block and b"\n\n\n" not in block and block[:1] != b"\n":
        return [event + b"\n\n" for event in block.split(b"\n\n") if event]
    found, start = [], 0
    for end in _EVENT_END.finditer(block + b"."):  # the added byte shows that a last CR is a whole line end
        stop = min(end.end(), len(block))
        found.append(block[start:stop])
        start = stop
    return found if start == len(block) else [*found, block[start:]]


def read(block: bytes) -> list[tuple[bytes, bytes]]:
    """The events of a block, each with its payload."""
    if block.startswith(b"data: ") and block.endswith(b"\n\n"):
        payloads = block[6:-2].split(b"\n\ndata: ")
        if block.count(b"\n") == 2 * len(payloads) and _CR not in block:
            return [(b"data: %b\n\n" % payload, payload) for payload in payloads]
    return [(event, payload(event)) for event in split(block)]


def payload(event: bytes) -> bytes:
    """The `data` of one event: its data lines joined by LF; empty for comments and keep-alives."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and _CR not in event:
        return event[6:-2]
    lines = []
    for line in _LINE_END.split(event):
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value[1:] if value.startswith(b" ") else value)
    return b"\n".join(lines)
