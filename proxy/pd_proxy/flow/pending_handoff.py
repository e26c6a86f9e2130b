"""A hand-off between prefill's answer and decode's first token."""

from __future__ import annotations

from time import monotonic
from typing import Literal

from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.handoff.connector import Handoff


class PendingHandoff:
    """A hand-off that decode has not yet begun to use; counted while it is so.

    Arguments:
        bound: seconds of age at which it is no longer sent.
    Attributes:
        prefill: whose blocks it names.
        since: when prefill answered, as `time.monotonic`; when its leg was made, as long as it has not.
        use: what decode has made of it. While one may be `reading`, nobody else may: prefill frees blocks that were
            read, and what a second reader finds in them is another request's, with nothing to show it. `refused`: it
            was sent, and answered with an error. `freed`: with one by which the engine has had prefill free its blocks.
        open: nobody has said yet that it is settled.
    """

    __slots__ = ("_fleet", "bound", "handoff", "open", "prefill", "since", "use")

    def __init__(self, fleet: Fleet, prefill: Backend, handoff: Handoff, bound: float) -> None:
        self._fleet = fleet
        self.bound = bound
        self.open = True
        self.prefill = prefill
        self.handoff = handoff
        self.since = monotonic()
        self.use: Literal["none", "reading", "refused", "freed"] = "none"
        fleet.handoffs_pending += 1
        prefill.open_handoffs += 1

    def sent(self) -> None:
        """A leg that refers to it has gone out."""
        self.use = "reading"

    def close(self) -> None:
        if self.open:
            self.open = False
            self._fleet.handoffs_pending -= 1
            self.prefill.open_handoffs -= 1
            if self.prefill.removed:
                self.prefill.attention.set()  # its watcher forgets it when this was the last
