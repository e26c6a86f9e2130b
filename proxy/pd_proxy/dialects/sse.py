"""Server-sent events: where they end, and their data.

Invariant: however the bytes are split, the blocks that `EventReader.feed` returns are the input in order, each ending
where an event ends. So a client only ever sees whole events, and an error event can follow at any moment without
landing in the middle of another.

Line ends may be LF, CRLF or CR (https://html.spec.whatwg.org/multipage/server-sent-events.html); engines use LF,
and only that path is made fast.
"""

from __future__ import annotations

import re

from pd_proxy.errors import BackendGarbled

DONE = b"data: [DONE]\n\n"
"""The event that ends a stream of chat's, completions' and SGLang's."""

# An event ends with an empty line: two line ends in a row. A CR that is last in the buffer may be half of a CRLF, so
# it only counts once the next byte is there.
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?=[^\n]))(?:\r\n|\n|\r(?=[^\n]))+")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_CR = ord("\r")
_LF = ord("\n")
_SEAM = 3  # bytes before a read in which the end of an event may begin: an empty line is CRLF CRLF at most


class EventReader:
    """Cuts a byte stream into blocks of whole events.

    Arguments:
        limit: bytes that one event may have before `BackendGarbled` is raised.
    Attributes:
        partial: the bytes after the last whole event: the beginning of the next, or nothing. Each of them is searched
            once and copied once, however many reads bring them.
    """

    __slots__ = ("_limit", "partial")

    def __init__(self, limit: int = 16 * 1024 * 1024) -> None:
        self._limit = limit
        self.partial = bytearray()

    def feed(self, data: bytes) -> bytes:
        """Add bytes; return all whole events that are there now (empty when none is)."""
        partial = self.partial
        if partial:
            seam = bytes(partial[-_SEAM:]) + data
            partial += data
            if seam.find(b"\n\n") < 0 and (_CR not in seam or _EVENT_END.search(seam) is None):
                self._check_limit()
                return b""
            data = bytes(partial)
            partial.clear()
        if data.endswith(b"\n\n"):
            return data
        cut = data.rfind(b"\n\n") + 2
        if _CR in data:
            cut = 0
            for end in _EVENT_END.finditer(data):
                cut = end.end()
        if cut < 2:
            cut = 0
        partial += data[cut:]
        self._check_limit()
        return data[:cut]

    def _check_limit(self) -> None:
        if len(self.partial) > self._limit:
            raise BackendGarbled(f"an event of more than {self._limit} bytes")


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
    # Parts are compared, since `startswith` costs twice as much. To count the line ends of the block would take three
    # instructions for each byte.
    if block[:6] == b"data: " and block[-2:] == b"\n\n":
        payloads = block[6:-2].split(b"\n\ndata: ")
        if _CR not in block and _LF not in b"".join(payloads):
            if len(payloads) == 1:
                return [(block, payloads[0])]
            # Not named like the function below: CPython 3.12.1 inlines both comprehensions, and then takes `payload` in
            # the other one for a local variable that was never set.
            return [(b"data: " + one + b"\n\n", one) for one in payloads]
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


def write_event(payload: bytes, name: bytes = b"") -> bytes:
    """A server-sent event with one line of data."""
    return b"event: %b\ndata: %b\n\n" % (name, payload) if name else b"data: %b\n\n" % payload
