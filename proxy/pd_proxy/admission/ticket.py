"""A request's ticket: what admission knows of the request, and what the request holds while it waits and runs."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from types import TracebackType
from typing import Literal, Protocol

import msgspec

from pd_proxy.admission.clients import Client
from pd_proxy.errors import GatewayError

State = Literal["new", "waiting", "running", "gone"]


class Reservation(Protocol):
    """Capacity of backends that is reserved for a request."""

    def release(self) -> object:
        """Release the capacity. Further calls do nothing."""


class Ticket(msgspec.Struct, eq=False):
    """One request as admission sees it. As a context manager it calls `leave` at the end.

    Arguments:
        client: the client that sent the request.
        model: the model as the client named it.
        split: whether the request is to be served by a pair.
        prefill_tokens, tokens: what its leases will count on the prefill and on the decode backend.
        size: the bytes of its body.
        timeout: the seconds that it may wait.
        expected: the expected seconds from its start to its first token, with the backends as they are now.
    Attributes:
        arrived, deadline: set by its `Admission`, on that one's clock.
        due: when it has to start to meet its target; infinite where it has none.
        best_effort: whether it can no longer meet its target, and so goes behind those of its client that can.
        number: its number in the order of arrival.
        started: when it was admitted.
        reservation: capacity that is reserved for it from its admission until it takes its leases.
        on_decision: called once when its waiting ends: with None where it was admitted, else with the error.
        on_leave: called by `leave` to return what the request holds.
    """

    client: Client
    model: str | None
    split: bool
    prefill_tokens: int
    tokens: int
    size: int
    timeout: float = inf
    expected: float = 0.0
    arrived: float = 0.0
    deadline: float = inf
    due: float = inf
    best_effort: bool = False
    state: State = "new"
    number: int = 0
    started: float = 0.0
    reservation: Reservation | None = None
    on_decision: Callable[[GatewayError | None], object] | None = None
    on_leave: Callable[[Ticket], object] | None = None

    def leave(self) -> None:
        """Return what the request holds. Further calls do nothing."""
        if self.on_leave is not None:
            self.on_leave(self)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
