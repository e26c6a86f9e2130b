"""The bytes of request bodies that are held, counted for all connections of a process, and bounded in sum.

A body is counted from its first byte until its request is answered. What does not fit is refused at once, and what has
come of it is free again, so that others can end; if all waited for room, they would wait for each other. An eighth of
the room is for short bodies alone. An upload that has stalled makes room for one that has not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

from pd_proxy.errors import BodiesFull, GatewayError, RequestTimedOut

SHORT = 64 * 1024
"""Bytes up to which a body is a short one."""
_STALLED = 5.0
"""Seconds without a further `SHORT` bytes after which an upload makes room; 13 kB/s are enough."""


class Holder(Protocol):
    """A request whose body is held.

    Attributes:
        held: bytes of it that are counted.
    """

    held: int

    def refuse(self, error: GatewayError) -> None:
        """Its body is not taken, and what has come of it is given up."""


@dataclass(slots=True)
class Bodies:
    """All bodies of a process.

    Arguments:
        limit: bytes that may be held.
        longest: bytes that one body may have. There is always room for one.
    Attributes:
        held: bytes that are.
        refused: bodies that were not taken for want of room, since the start, and uploads that had stalled then.
    """

    limit: int = 1 << 30
    longest: int = 64 << 20
    held: int = 0
    refused: dict[str, int] = field(default_factory=lambda: {"full": 0, "stalled": 0})
    _for_long: int = 0
    _arriving: dict[Holder, tuple[int, float]] = field(default_factory=dict)
    """Long bodies that are not whole: the bytes at which they last went on by enough, and when."""

    def __post_init__(self) -> None:
        self._for_long = max(self.limit - self.limit // 8, self.longest)
        self.limit = max(self.limit, self._for_long + self.longest // 8)

    def take(self, holder: Holder, count: int) -> bool:
        """Whether bytes of a body may be held; where not, their request has been refused."""
        self.held = all_held = self.held + count
        holder.held = held = holder.held + count
        if held <= SHORT:
            if all_held <= self.limit:
                return True
        else:
            now = monotonic()
            before = self._arriving.get(holder)
            if before is None or held >= before[0] + SHORT:
                self._arriving[holder] = held, now
        return self.held <= self._for_long or self._finds_room(holder)

    def whole(self, holder: Holder) -> None:
        """All of a body is here."""
        self._arriving.pop(holder, None)

    def release(self, holder: Holder) -> None:
        """Nothing of a body is held any more."""
        self.held -= holder.held
        holder.held = 0
        if self._arriving:
            self._arriving.pop(holder, None)

    def let_go(self, holder: Holder, count: int) -> None:
        """Some bytes of a body are not held any more."""
        self.held -= count
        holder.held -= count
        if not holder.held:
            self._arriving.pop(holder, None)

    def _finds_room(self, holder: Holder) -> bool:
        bound = self._for_long if holder.held > SHORT else self.limit
        stalled_since = monotonic() - _STALLED
        for other, (_, since) in sorted(self._arriving.items(), key=lambda item: item[1][1]):
            if self.held <= bound or since > stalled_since:
                break
            if other is not holder:
                self._refuse(
                    other, "stalled", RequestTimedOut("the request body stalled, and others had need of its room")
                )
        if self.held <= bound:
            return True
        full = BodiesFull(f"this gateway holds {bound} bytes of requests already, as many as it may", retry_after=1)
        self._refuse(holder, "full", full)
        return False

    def _refuse(self, holder: Holder, why: str, error: GatewayError) -> None:
        self.refused[why] += 1
        self.release(holder)
        holder.refuse(error)
