"""Mass failure: which failed health checks are excused, since they say nothing about the engine that was asked.

When most engines fail a health check at the same moment, the common cause is nearly always on the gateway's side: its
event loop or its host stood still, or the network failed. The checks that failed then do not count. The engines are
asked again at once, and only a check that fails then counts. So the death of all engines is seen one check later than
the death of one.

No clock is read here: the time is passed in. There are two causes:

- `late`: while the check ran, the event loop was late by at least the share `LATE` of the check's time limit, so the
  answer may have come in time. This is excused at most `MOST_LATE` times in a row, so that a gateway that is always
  late takes dead engines out of the rotation as well.
- `mass`: more than half of the backends in the rotation, and at least two, fail their checks now. This is excused once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from typing import Literal

Excuse = Literal["late", "mass"]
EXCUSES: tuple[Excuse, ...] = ("late", "mass")

LATE = 0.25
"""The share of a check's time limit by which the event loop may be late."""
MOST_LATE = 5
OVERDUE = 0.5
"""The share of a check's time limit after which a check without an answer counts as failing, if another has failed."""
_KEPT = 64  # delays of the event loop that are remembered
_NOTABLE = 0.02  # seconds; a shorter delay does not count


class Delays:
    """When the event loop was late, and by how much."""

    __slots__ = ("_noted",)

    def __init__(self) -> None:
        self._noted: deque[tuple[float, float]] = deque(maxlen=_KEPT)

    def note(self, seconds: float, now: float) -> None:
        """Note that the event loop was late by `seconds`, until `now`."""
        if seconds >= _NOTABLE:
            self._noted.append((now - seconds, now))

    def since(self, began: float) -> float:
        """The seconds by which the event loop was late after `began`."""
        total = 0.0
        for start, end in reversed(self._noted):
            if end <= began:
                break
            total += end - max(start, began)
        return total


class Checks:
    """The health checks of the backends in the rotation: those that run, and those that failed.

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
        """Note that a check begins."""
        self._asked[backend] = now

    def ended(self, backend: Hashable, good: bool) -> None:
        """Note that a check has ended; its outcome holds until the next one ends."""
        self._asked.pop(backend, None)
        if good:
            self._failing.discard(backend)
        else:
            self._failing.add(backend)

    def forget(self, backend: Hashable) -> None:
        """Forget the checks of a backend that has left the rotation, or enters it."""
        self._asked.pop(backend, None)
        self._failing.discard(backend)

    def fails(self, backend: Hashable, now: float) -> bool:
        """Whether a backend's last check has failed, or the one that runs is overdue."""
        if backend in self._failing:
            return True
        asked = self._asked.get(backend)
        return asked is not None and now - asked > OVERDUE * self._timeout

    def excuse(self, others: Iterable[Hashable], since: float, now: float) -> Excuse | None:
        """Why the checks of a backend that have failed since `since` do not count; None if they count.

        Arguments:
            others: the other backends in the rotation.
        """
        if self.delays.since(since) >= LATE * self._timeout:
            return "late"
        members, failing = 1, 1
        for other in others:
            members += 1
            failing += self.fails(other, now)
        return "mass" if failing > 1 and failing * 2 > members else None


class Run:
    """The failed checks of one backend in a row, as far as they count.

    Arguments:
        needed: the number of failed checks in a row that takes a backend out of the rotation.
        began: when the first check began.
    """

    __slots__ = ("_began", "_failed", "_late", "_mass", "_needed", "last")

    def __init__(self, needed: int, began: float) -> None:
        self._needed, self._began = needed, began
        self._failed = self._late = 0
        self._mass = False
        self.last: Excuse | None = None
        """Why the last failed check did not count, if it would have taken the backend out of the rotation."""

    def failed(self, checks: Checks, others: Iterable[Hashable], now: float) -> bool:
        """Note that a check has failed; returns whether the backend is to leave the rotation."""
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
