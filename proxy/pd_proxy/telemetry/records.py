"""What the other packages report to telemetry, and nothing about where it goes.

A `Distribution` is a histogram that sinks read when they are scraped; to observe a value is to put it into a list.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, auto
from time import monotonic
from typing import Any, Protocol

from pd_proxy.transitions import table

log = logging.getLogger("pd_proxy.telemetry")

# Upper bounds in seconds. LLM serving spans five decades: a cached prompt answers in 10 ms, a 100k-token prompt behind
# a queue in minutes. Three buckets a decade (1, 2.5, 5) keep a quantile within a factor of about 1.6.
TTFT_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0, 600.0)
# A token's time is 5 to 100 ms on most hardware: finer there, since 20 % is what tuning argues about.
ITL_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
DURATION_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
RESUME_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
HANDOFF_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
QUEUE_BOUNDS = (0.001, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
LOOP_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

BATCH = 256  # values that wait to be counted, at most: 8 kB for each distribution


class Distribution:
    """A histogram: `counts[i]` observations at most `bounds[i]` (and above the last), and their sum.

    Values wait in a list until there are some, or somebody reads: sorted, they are counted in one pass.

    Attributes:
        note: as `observe`, for whoever calls `fold` now and then: it does not look how many values wait.
    """

    __slots__ = ("_counts", "_fresh", "_sum", "bounds", "note")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._fresh: list[float] = []
        self.note = self._fresh.append

    def observe(self, value: float) -> None:
        fresh = self._fresh
        fresh.append(value)
        if len(fresh) > BATCH:
            self.fold()

    def observe_all(self, values: list[float]) -> None:
        """Several at once."""
        self._fresh += values
        if len(self._fresh) > BATCH:
            self.fold()

    def observe_none(self, times: int) -> None:
        """0, so many times."""
        self._counts[0] += times

    @property
    def counts(self) -> list[int]:
        self.fold()
        return self._counts

    @property
    def sum(self) -> float:
        self.fold()
        return self._sum

    def fold(self) -> None:
        """Count what waits."""
        values = sorted(self._fresh)
        self._fresh.clear()
        before = 0
        for index, bound in enumerate(self.bounds):
            up_to = bisect_right(values, bound, before)
            self._counts[index] += up_to - before
            before = up_to
        self._counts[-1] += len(values) - before
        self._sum += sum(values)


class Stage(Enum):
    """Where a request is in its life."""

    QUEUED = auto()
    """Not placed yet: its key and its body are checked, or it waits in admission's queue."""
    PLACED = auto()
    """The backends of a try are chosen."""
    ENCODING = auto()
    """Its media are at encoders."""
    PREFILLING = auto()
    """Its prefill leg runs; with a concurrent order, decode's as well."""
    HANDED_OVER = auto()
    """Prefill has answered, and decode's leg is to get its KV cache."""
    DECODING = auto()
    """Its answering leg runs without a hand-off, and the client has no token yet."""
    STREAMING = auto()
    """The client has a part of the answer."""
    RESUMING = auto()
    """The stream broke, and another try is to continue it."""
    DONE = auto()
    """It ended, with an answer or without."""

    __hash__ = object.__hash__  # that of `Enum` is a call of Python's, several times for each request


TRANSITIONS = table(
    "a request",
    {
        Stage.QUEUED: (Stage.PLACED, Stage.DONE),
        Stage.PLACED: (Stage.PLACED, Stage.ENCODING, Stage.PREFILLING, Stage.DECODING, Stage.DONE),
        Stage.ENCODING: (Stage.PLACED, Stage.PREFILLING, Stage.DECODING, Stage.DONE),
        Stage.PREFILLING: (Stage.PLACED, Stage.HANDED_OVER, Stage.DECODING, Stage.STREAMING, Stage.DONE),
        Stage.HANDED_OVER: (Stage.PLACED, Stage.STREAMING, Stage.DONE),
        Stage.DECODING: (Stage.PLACED, Stage.STREAMING, Stage.DONE),
        Stage.STREAMING: (Stage.RESUMING, Stage.DONE),
        Stage.RESUMING: (Stage.RESUMING, Stage.STREAMING, Stage.DONE),
        Stage.DONE: (),
    },
)
"""`TRANSITIONS[now][then]` is the stage that follows; `ImpossibleTransition` is raised where it cannot follow. Another
try takes a request back to PLACED while its client has nothing of the answer, and to RESUMING after that."""
_WHERE = {
    Stage.QUEUED: "admission",
    Stage.PLACED: "admission",
    Stage.ENCODING: "encode",
    Stage.PREFILLING: "prefill",
    Stage.HANDED_OVER: "decode",
    Stage.DECODING: "decode",
    Stage.STREAMING: "stream",
    Stage.RESUMING: "stream",
}


@dataclass(slots=True)
class RequestRecord:
    """One client request from its first byte to its end. Times are seconds; those of events are `time.monotonic`.

    Attributes:
        model: as engines call it.
        alias: what the client called it, where that is another name.
        outcome: `ok`, `client_gone`, or the `code` of the error that ended it.
        stage: where the request is in its life; changed by `reach` alone.
        stage_before: the stage before the last try's placement, or before the end.
        prefill, decode: URLs of the backends of the last try; `mixed` or local decode leaves prefill empty.
            An answer that prefill gave alone leaves decode empty.
        decode_pool: `decode` or `mixed`; `prefill` for an answer that prefill gave alone.
        tries: how often the request was placed.
        leg: the X-Request-Id of the last try's legs, which begins with the request's own where the connector allows.
        answer: what the engine was told to call its answer, where its API does not look at X-Request-Id; else empty.
        peer: address and port of the client's connection; None where it has none.
        trace: headers of the client's trace context, as whole lines for the legs; empty where it sent none.
        client: whose key it came with, by name; empty when it came with none that is known.
        admitted: it was let in.
        queued_seconds: how long it waited in the queue for that, or before it was refused or left.
        refused: the code of the error with which admission turned it away, or empty.
        best_effort: it could not meet its target any more, and went behind those that could.
        retries: (leg, reason) of every try that failed and was followed by another.
        first_token_from: whose first token the client got, `prefill` or `decode`, of a pair; else empty.
        first_token_reason: why; the words are those of `docs/first-token.md`.
        second_token: when the token behind prefill's came, which was decode's first.
        handoff_gap: seconds between those two, unless the stream broke there.
        resumes: why the stream broke, for every time it was continued on other backends.
        resume_gaps: seconds between the last token before and the first one after, for each of them.
        not_resumed: why a broken stream could not be continued, or empty.
        fallback: why the request was served without a hand-off, or empty.
        sequence: the number of the last event that the client was given, where its API numbers them; else -1.
        tokens: completion tokens, as the engine counted them; where it did not say, token events as the relay did.
    """

    endpoint: str
    request_id: str = ""
    model: str = ""
    alias: str = ""
    stream: bool = False
    started: float = field(default_factory=monotonic)
    ended: float = 0.0
    status: int = 0
    outcome: str = ""
    stage: Stage = Stage.QUEUED
    stage_before: Stage = Stage.QUEUED
    client: str = ""
    admitted: bool = False
    queued_seconds: float = 0.0
    refused: str = ""
    best_effort: bool = False
    prefill: str = ""
    decode: str = ""
    decode_pool: str = "decode"
    tries: int = 0
    leg: str = ""
    answer: str = ""
    peer: tuple[str, int] | None = None
    trace: bytes = b""
    prefill_seconds: float | None = None
    handoff_seconds: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    first_token_from: str = ""
    first_token_reason: str = ""
    second_token: float | None = None
    handoff_gap: float | None = None
    retries: list[tuple[str, str]] = field(default_factory=list)
    resumes: list[str] = field(default_factory=list)
    resume_gaps: list[float] = field(default_factory=list)
    not_resumed: str = ""
    fallback: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    sequence: int = -1
    tokens: int = 0
    error: str = ""

    @property
    def trace_id(self) -> str:
        """Of the client's trace, or an empty string."""
        return self.trace[16:48].decode("latin-1")

    @property
    def known_as(self) -> dict[str, Any]:
        """`extra` of a log line about this request: by what it is known to its client and to the engines."""
        return self.known_by(self.leg)

    def known_by(self, leg: str) -> dict[str, Any]:
        """The same of one that is about legs of an earlier try."""
        names = {"id": self.request_id, "route": self.endpoint, "leg": leg, "answer": self.answer}
        names["trace_id"] = self.trace_id
        members = {name: value for name, value in names.items() if value}
        return {"fields": {name: members[name] for name in ("leg", "answer") if name in members}, "members": members}

    def reach(self, stage: Stage) -> None:
        """The request is at another stage of its life; `placed` and `end` say so for theirs.

        Raises:
            ImpossibleTransition: that stage cannot follow.
        """
        self.stage = TRANSITIONS[self.stage][stage]

    @property
    def where(self) -> str:
        """The word of logs and metrics for the stage: `admission`, `encode`, `prefill`, `decode` (before the first
        token), `stream` (after it). Until another try has begun, and after the end, it is that of the stage before."""
        stage = self.stage
        return _WHERE[self.stage_before if stage is Stage.PLACED or stage is Stage.DONE else stage]

    def end(self, now: float) -> None:
        """The request has ended, with an answer or without."""
        self.ended = now
        if self.stage is not Stage.PLACED:
            self.stage_before = self.stage
        self.reach(Stage.DONE)

    def placed(self, pool: str, backend: str, prefill: str = "") -> None:
        """A try begins: where it goes, and nothing of what the tries before it took.

        Arguments:
            pool, backend: of the one that answers.
            prefill: the backend that computes the prompt for it, or empty.
        """
        self.tries += 1
        if self.stage is not Stage.RESUMING:
            if self.stage is not Stage.PLACED:
                self.stage_before = self.stage
            self.reach(Stage.PLACED)
        self.decode_pool = pool
        if pool == "prefill":
            self.decode, self.prefill = "", backend
        else:
            self.decode, self.prefill = backend, prefill
        if self.tries > 1:
            self.prefill_seconds = self.handoff_seconds = None
            self.prompt_tokens = self.cached_tokens = 0

    @property
    def ttft(self) -> float | None:
        """Time to first token as the client saw it."""
        return None if self.first_token is None else self.first_token - self.started

    @property
    def tpot(self) -> float | None:
        """(last token - first token) / (tokens - 1), for streams of two tokens or more: decode's pace. Where the first
        was prefill's, it is counted from decode's own first: what lies between is `handoff_gap`. The last counts from
        when it was read, and the first from when it was passed on: of one read it is the later of the two."""
        first, last, tokens = self.first_token, self.last_token, self.tokens
        if self.second_token is not None:
            first, tokens = self.second_token, tokens - 1
        return None if first is None or last is None or tokens < 2 else max(0.0, last - first) / (tokens - 1)


class PrefixCounts:
    """Prompt tokens that were expected in prefix caches, and those that engines reported to have found there.

    Only answers that say what was cached are counted, both for what was expected and for what was found: a ratio of the
    two says how good the index is.
    """

    __slots__ = ("cached", "expected")

    def __init__(self) -> None:
        self.expected: Counter[tuple[str, str]] = Counter()
        self.cached: Counter[tuple[str, str]] = Counter()

    def note(self, pool: str, backend: str, expected: int, cached: int) -> None:
        """An engine has said what it found of a prompt.

        Arguments:
            pool, backend: that computed it.
            expected, cached: tokens.
        """
        key = (pool, backend)
        self.expected[key] += expected
        self.cached[key] += cached

    def forget(self, backend: str) -> None:
        """A backend has left for good."""
        for counter in (self.expected, self.cached):
            for key in [key for key in counter if key[1] == backend]:
                del counter[key]


class Sink(Protocol):
    """Takes what became of requests."""

    def finished(self, record: RequestRecord) -> None:
        """A request ended. Must not raise."""


class Telemetry(Sink, Protocol):
    """The hook that the flow holds."""

    def gaps(self, pool: str, backend: str) -> Distribution:
        """Where the relay notes the gaps between the tokens of a backend's streams."""

    def handoff_released(self, claimed: bool) -> None:
        """A hand-off that nobody wanted was claimed, so that prefill's blocks are free; or it could not be."""


class Sinks:
    """Several sinks as one `Telemetry`: the first keeps the gaps."""

    def __init__(self, first: Telemetry, *others: Sink) -> None:
        self.gaps = first.gaps
        self.handoff_released = first.handoff_released
        self._finished = [sink.finished for sink in (first, *others)]

    def finished(self, record: RequestRecord) -> None:
        for finished in self._finished:
            try:
                finished(record)
            except Exception:  # the request is over, and the other sinks are to know of it
                log.exception("%s: a sink failed on this request's record", record.request_id, extra=record.known_as)
