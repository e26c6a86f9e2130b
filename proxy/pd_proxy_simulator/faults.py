"""Faults: which failures are injected, for which leg and how often. They are switched on in the process or over HTTP.

Invariant: a fault with a count is used up by the requests that it hit and by nothing else. A request is hit by the
first matching fault of each kind; all of them are drawn once, when the request arrives.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import msgspec

Kind = Literal[
    "refuse",
    "reset",
    "hang",
    "slow",
    "delay_first_byte",
    "die_mid_stream",
    "stall_mid_stream",
    "drop_handoff_params",
    "status",
    "error_event_first",
    "garbage",
    "recomputed",
    "slow_body",
    "engine_death",
]
Leg = Literal["any", "prefill", "decode", "local", "encode", "health", "pull"]
Ending = Literal["reset", "close", "kill", "truncated", "garbage", "json", "error", "done", "end"]


class Fault(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One fault. `leg` "any" means every inference request (prefill leg, decode leg, or one without a hand-off). "pull"
    means a decode engine's requests to this engine's side channel, which `hang`, `reset` and `delay_first_byte` can
    hit.

    `ending` says how an answer breaks off: its connection is `reset` or closed (`close`); `kill` ends the whole
    process; `truncated` is half a chunk and a close; `garbage` is bytes without framing and a close. The others are
    proper HTTP: `json` is an event with broken JSON, then `[DONE]`; `error` is an error event, then `[DONE]`; `done` is
    only `[DONE]`; `end` is the end of the answer without `[DONE]`.
    """

    kind: Kind
    leg: Leg = "any"
    count: int | None = None  # how many more requests it hits; None: all
    probability: float = 1.0
    status: int = 500  # status
    # For die_mid_stream, stall_mid_stream and recomputed. 0: after the headers (and chat's role). -1: after the last
    # token, when only usage and [DONE] are missing; of an answer in one piece, half the body has been sent then.
    after_tokens: int = 1
    delay_s: float = 1.0  # for delay_first_byte, and slow_body: between two pieces
    piece_bytes: int = 16  # slow_body
    factor: float = 10.0  # slow
    duration_s: float | None = None  # for refuse: None (in the process only) lasts until the fault is removed
    # for garbage; all but bytes are under a 200
    form: Literal["bytes", "json", "truncated", "error", "empty"] = "bytes"
    ending: Ending = "reset"  # die_mid_stream
    retry_after: int | None = None  # status: a Retry-After header
    hits: int = 0  # how many requests it has hit

    def __post_init__(self) -> None:
        """Refuse values that have no meaning."""
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {self.probability}")
        if self.factor <= 0:
            raise ValueError(f"factor must be positive, got {self.factor}")
        if self.kind == "status" and not 400 <= self.status <= 599:
            raise ValueError(f"status must be an error status, got {self.status}")
        if self.after_tokens < -1:
            raise ValueError(f"after_tokens must be at least -1, got {self.after_tokens}")


class InjectedFaults:
    """The faults that hit one request, by kind."""

    __slots__ = ("faults",)

    def __init__(self, faults: dict[str, Fault]) -> None:
        self.faults = faults

    def get(self, kind: Kind) -> Fault | None:
        """The fault of a kind that hits this request, or None."""
        return self.faults.get(kind)


NOTHING = InjectedFaults({})


class Faults:
    """The faults of one simulator."""

    def __init__(self, changed: Callable[[], None], seed: int = 0) -> None:
        self._active: list[Fault] = []
        self._changed = changed
        self._random = random.Random(seed)

    def __iter__(self) -> Iterator[Fault]:
        return iter(self._active)

    def __len__(self) -> int:
        return len(self._active)

    def add(self, kind: Kind, **options: Any) -> Fault:
        """Switch a fault on, beside the others; returns it, so that its `hits` can be read."""
        fault = msgspec.convert({"kind": kind, **options}, Fault)
        self._active.append(fault)
        self._changed()
        return fault

    def replace(self, faults: Iterable[Fault]) -> None:
        """Switch on exactly these."""
        self._active = list(faults)
        self._changed()

    def remove(self, fault: Fault) -> None:
        """Switch one off."""
        self._active = [other for other in self._active if other is not fault]
        self._changed()

    def clear(self) -> None:
        """Switch all off."""
        self.replace([])

    def find(self, kind: Kind) -> Fault | None:
        """The first fault of a kind, without drawing it."""
        return next((fault for fault in self._active if fault.kind == kind), None)

    def lasting(self, kind: Kind, leg: Leg) -> bool:
        """Whether a fault of a leg is on that lasts until it is switched off."""
        return any(fault.kind == kind and fault.leg == leg and fault.count is None for fault in self._active)

    def slowness(self) -> float:
        """The factor of all `slow` faults together."""
        factor = 1.0
        for fault in self._active:
            if fault.kind == "slow":
                factor *= fault.factor
        return factor

    def draw(self, leg: Leg) -> InjectedFaults:
        """The faults that hit one request of this leg."""
        if not self._active:
            return NOTHING
        drawn: dict[str, Fault] = {}
        for fault in self._active:
            if fault.kind in ("refuse", "slow") or fault.kind in drawn or fault.count == 0:
                continue
            if fault.leg != leg and not (fault.leg == "any" and leg not in ("health", "pull")):
                continue
            if fault.probability < 1 and self._random.random() >= fault.probability:
                continue
            fault.hits += 1
            if fault.count is not None:
                fault.count -= 1
            drawn[fault.kind] = fault
        return InjectedFaults(drawn)


def parse_faults(body: Any) -> list[Fault]:
    """The faults in a PUT: one object, a list, or `{"faults": [...]}`. Raises ValueError."""
    if isinstance(body, dict) and "faults" in body:
        body = body["faults"]
    if isinstance(body, dict):
        body = [body]
    try:
        faults: list[Fault] = msgspec.convert(body, list[Fault])
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error
    if any(fault.kind == "refuse" and fault.duration_s is None for fault in faults):
        raise ValueError("refuse needs duration_s over HTTP: nobody could switch it off")
    return faults
