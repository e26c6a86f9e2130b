"""A request's ticket: what admission decides about, and what the request holds while it waits and runs."""

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
    """Capacity of backends that is kept for a request."""

    def release(self) -> object:
        """Return it. Further calls do nothing."""


class Ticket(msgspec.Struct, eq=False):
    """A request's place. As a context manager it is returned at the end, with everything that the request has.

    Arguments:
        client: whose request it is.
        model: as the client names it.
        split: whether it is meant for a pair.
        prefill_tokens, tokens: what its leases will count on the prefill and on the decode backend.
        size: bytes of its body.
        timeout: seconds that it may wait.
        expected: seconds from its start to its first token, as its backends are now.
    Attributes:
        arrived, deadline: by the clock of its `Admission`, which sets them.
        due: when it has to start to meet its target; infinite where it has none.
        best_effort: it cannot meet its target any more, and goes behind those of its client's that can.
        number: its place in the order of arrival.
        started: when it was let in.
        reservation: capacity that is kept for it between its being let in and its leases.
        on_decision: called once with the result of its waiting: None when it was let in, else the reason why not.
        on_leave: returns what it has.
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
        """Return what the request has. Further calls do nothing."""
        if self.on_leave is not None:
            self.on_leave(self)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
