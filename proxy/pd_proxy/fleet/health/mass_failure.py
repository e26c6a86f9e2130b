"""Mass failure: which failed health checks say nothing about the engine that was asked.

When most engines fail a health check at the same moment, their common cause is nearly always this side: the event loop
or the whole host stood still, or the network between. The checks that failed then do not count. The engines are asked
again at once, and only what fails then counts, so a real death of everything is seen one check later than the death of
one engine.

Pure: time is passed in. Two causes are told apart:

- `late`: the event loop ran `LATE` of a check's time limit late or more while the check was under way. The answer may
  have been there in time. This is excused again and again, `MOST_LATE` times in a row at most, so that an engine that
  is dead leaves the rotation of a gateway that is always late as well.
- `mass`: more than half of the backends in the rotation, at least two, fail their checks now. Excused once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from typing import Literal

Excuse = Literal["late", "mass"]
EXCUSES: tuple[Excuse, ...] = ("late", "mass")

LATE = 0.25
"""Share of a check's time limit that the event loop may be late for."""
MOST_LATE = 5
OVERDUE = 0.5
"""Share of a check's time limit after which a check without an answer counts as failing, beside one that has failed."""
_KEPT = 64  # delays of the event loop; one that counts is no shorter than `_NOTABLE`
_NOTABLE = 0.02  # seconds


class Delays:
    """When the event loop was late, and for how long."""

    __slots__ = ("_noted",)

    def __init__(self) -> None:
        self._noted: deque[tuple[float, float]] = deque(maxlen=_KEPT)

    def note(self, seconds: float, now: float) -> None:
        """The event loop has been late by `seconds`, until `now`."""
        if seconds >= _NOTABLE:
            self._noted.append((now - seconds, now))

    def since(self, began: float) -> float:
        """Seconds for which the event loop has been late after `began`."""
        total = 0.0
        for start, end in reversed(self._noted):
            if end <= began:
                break
            total += end - max(start, began)
        return total


class Checks:
    """The health checks of the backends in the rotation: under way, failed, answered.

    Arguments:
        timeout: seconds that one check may take.
    Attributes:
        delays: of the event loop.
    """

    __slots__ = ("_asked", "_failing", "_timeout", "delays")

    def __init__(self, timeout: float, delays: Delays | None = None) -> None:
        self._timeout = timeout
        self._asked: dict[Hashable, float] = {}
        self._failing: set[Hashable] = set()
        self.delays = delays or Delays()

    def began(self, backend: Hashable, now: float) -> None:
        """A check is sent."""
        self._asked[backend] = now

    def ended(self, backend: Hashable, good: bool) -> None:
        """A check has ended; what it says holds until the next one ends."""
        self._asked.pop(backend, None)
        if good:
            self._failing.discard(backend)
        else:
            self._failing.add(backend)

    def forget(self, backend: Hashable) -> None:
        """A backend is in the rotation no more, or has just come into it."""
        self._asked.pop(backend, None)
        self._failing.discard(backend)

    def fails(self, backend: Hashable, now: float) -> bool:
        """Whether a backend's last check has failed, or the one under way is overdue."""
        if backend in self._failing:
            return True
        asked = self._asked.get(backend)
        return asked is not None and now - asked > OVERDUE * self._timeout

    def excuse(self, others: Iterable[Hashable], since: float, now: float) -> Excuse | None:
        """Why the checks of a backend that have failed since `since` do not count; None where they do.

        Arguments:
            others: the backends that are in the rotation beside it.
        """
        if self.delays.since(since) >= LATE * self._timeout:
            return "late"
        members, failing = 1, 1
        for other in others:
            members += 1
            failing += self.fails(other, now)
        return "mass" if failing > 1 and failing * 2 > members else None


class Run:
    """The checks of one backend from one that failed on, as they count against it.

    Arguments:
        needed: failed checks in a row that take a backend out.
        began: when the first check was sent.
    """

    __slots__ = ("_began", "_failed", "_late", "_mass", "_needed", "last")

    def __init__(self, needed: int, began: float) -> None:
        self._needed, self._began = needed, began
        self._failed = self._late = 0
        self._mass = False
        self.last: Excuse | None = None
        """Why the last failed check did not count, where it would have taken the backend out."""

    def failed(self, checks: Checks, others: Iterable[Hashable], now: float) -> bool:
        """A check has failed: whether the backend is to leave the rotation."""
        self._failed += 1
        self.last = None
        if self._failed < self._needed:
            return False
        why = checks.excuse(others, self._began, now)
        if (why == "late" and self._late < MOST_LATE) or (why == "mass" and not self._mass):
            self.last = why
            self._late += why == "late"
            self._mass = self._mass or why == "mass"
            self._failed, self._began = self._needed - 1, now
            return False
        return True
