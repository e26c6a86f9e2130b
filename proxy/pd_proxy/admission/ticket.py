"""What a request holds while it asks, waits and runs."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from types import TracebackType
from typing import Literal, Protocol

import msgspec

from pd_proxy.admission.clients import Client
from pd_proxy.errors import GatewayError

State = Literal["new", "waiting", "running", "gone"]


class Claim(Protocol):
    """Room on backends that is kept for a request."""

    def release(self) -> object:
        """Give it back; once or more often."""


class Ticket(msgspec.Struct, eq=False):
    """A request's place: a context manager, which gives back whatever the request has, once.

    Arguments:
        model: as the client names it.
        split: it is meant for a pair.
        prefill_tokens, tokens: what its leases will count on the prefill and on the decode backend.
        size: bytes of its body.
        arrived, deadline: by the clock of its `Admission`.
        expected: seconds from its start to its first token, as its backends are now.
    Attributes:
        due: when it has to start to meet its target; infinite where it has none.
        best_effort: it cannot meet its target any more, and goes behind those of its client's that can.
        number: its place in the order of arrival.
        started: when it was let in.
        claim: room that is kept for it between its being let in and its leases.
        settle: told once what became of it while it waited: None when it was let in, else why not.
        on_leave: gives back what it has.
    """

    client: Client
    model: str | None
    split: bool
    prefill_tokens: int
    tokens: int
    size: int
    arrived: float
    deadline: float
    expected: float = 0.0
    due: float = inf
    best_effort: bool = False
    state: State = "new"
    number: int = 0
    started: float = 0.0
    claim: Claim | None = None
    settle: Callable[[GatewayError | None], object] | None = None
    on_leave: Callable[[Ticket], object] | None = None

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.on_leave is not None:
            self.on_leave(self)
