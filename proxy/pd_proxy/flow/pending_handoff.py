"""A hand-off between prefill's answer and decode's first token."""

from __future__ import annotations

from enum import Enum, auto
from time import monotonic

from pd_proxy.errors import BackendAnswered, BackendError, BackendRejected
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.handoff.connector import Handoff
from pd_proxy.transitions import ImpossibleTransition


class HandoffUse(Enum):
    """How far decode has used a hand-off."""

    UNUSED = auto()
    """No decode engine has read it."""
    READING = auto()
    """A leg that refers to it was sent, and its blocks may be read now. Prefill frees blocks that were read, so no
    other leg may read them: it could read the blocks of another request without an error."""
    REFUSED = auto()
    """A decode leg that refers to it was answered with an error."""
    SETTLED = auto()
    """Decode has what it needs of it, or the blocks are free, or nothing more can be done for them."""

    __hash__ = object.__hash__  # that of `Enum` is a call of Python's, a few times for each request


_UNUSED, _READING, _REFUSED, _SETTLED = HandoffUse
TRANSITIONS: dict[HandoffUse, frozenset[HandoffUse]] = {
    _UNUSED: frozenset({_UNUSED, _READING, _REFUSED, _SETTLED}),
    _READING: frozenset({_UNUSED, _READING, _REFUSED, _SETTLED}),
    _REFUSED: frozenset({_UNUSED, _READING, _REFUSED, _SETTLED}),
    _SETTLED: frozenset({_SETTLED}),
}
"""Which use may follow which.

- UNUSED to UNUSED or REFUSED: a leg failed, or was answered, before the whole of it was written.
- READING to READING: both legs of a concurrent order refer to it.
- READING to UNUSED: decode's leg failed, and its engine surely never read the request.
- REFUSED to READING: the engine refused the leg at its front door, and another decode engine gets the hand-off.
"""


class PendingHandoff:
    """A hand-off that decode has not yet begun to use. The fleet and prefill's backend count it until it is settled.

    Arguments:
        bound: seconds of age at which it is no longer sent.
    Attributes:
        prefill: the backend that has its blocks.
        since: when prefill answered, as `time.monotonic`; before its answer, when the hand-off was made.
        use: how far decode has used it.
    """

    __slots__ = ("_fleet", "bound", "handoff", "prefill", "since", "use")

    def __init__(self, fleet: Fleet, prefill: Backend, handoff: Handoff, bound: float) -> None:
        self._fleet = fleet
        self.bound = bound
        self.prefill = prefill
        self.handoff = handoff
        self.since = monotonic()
        self.use = _UNUSED
        fleet.handoffs_pending += 1
        prefill.open_handoffs += 1

    def sent(self) -> None:
        """A leg that refers to it was written to its connection."""
        if self.use is not _SETTLED:  # prefill may have failed while the leg was waiting to be written
            self._becomes(_READING)

    def leg_failed(self, error: BackendError, *, refusal_frees: bool) -> None:
        """A decode leg that refers to it has failed.

        Arguments:
            refusal_frees: an engine's handler that refuses the leg has prefill free the blocks.
        """
        if self.use is _SETTLED:
            return
        if isinstance(error, BackendAnswered):
            if refusal_frees and isinstance(error, BackendRejected) and error.handled:
                self.settle()  # a second release would be of blocks that may be another request's by now
            else:
                self._becomes(_REFUSED)
        elif error.unread:
            self._becomes(_UNUSED)

    def settle(self) -> None:
        """It is not needed any more. It is counted no longer."""
        if self.use is not _SETTLED:
            self._becomes(_SETTLED)
            self._fleet.handoffs_pending -= 1
            self.prefill.open_handoffs -= 1
            if self.prefill.removed:
                self.prefill.attention.set()  # its watcher forgets the backend when this was the last

    def _becomes(self, use: HandoffUse) -> None:
        if use not in TRANSITIONS[self.use]:
            raise ImpossibleTransition(f"a hand-off that is {self.use.name} cannot become {use.name}")
        self.use = use
