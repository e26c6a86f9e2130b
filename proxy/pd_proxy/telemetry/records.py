"""The records that other packages hand to telemetry, independent of the sinks that take them.

A `Distribution` is a histogram that sinks read when they are scraped. Observing a value only appends it to a list.
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
# A token takes 5 to 100 ms on most hardware. The buckets are finer there, since tuning is about differences of 20 %.
ITL_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
DURATION_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
RESUME_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
HANDOFF_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
QUEUE_BOUNDS = (0.001, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
LOOP_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

BATCH = 256  # values that a distribution buffers at most: 8 kB


class Distribution:
    """A histogram: `counts[i]` is the number of values up to `bounds[i]`, the last one of those above all bounds.

    Values are buffered in a list until it is full or the histogram is read. Then they are sorted and counted in one
    pass.

    Attributes:
        note: as `observe`, but does not check how full the buffer is; its caller has to call `fold` from time to time.
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
        """Observe several values."""
        self._fresh += values
        if len(self._fresh) > BATCH:
            self.fold()

    def observe_none(self, times: int) -> None:
        """Observe 0, so many times."""
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
        """Count the buffered values."""
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
    """The stage of a request's life."""

    QUEUED = auto()
    """Not placed yet: its key and body are checked, or it waits in admission's queue."""
    PLACED = auto()
    """The backends of a try are chosen."""
    ENCODING = auto()
    """Encode backends compute the embeddings of its media."""
    PREFILLING = auto()
    """Its prefill leg runs; with a concurrent order, its decode leg runs as well."""
    HANDED_OVER = auto()
    """Prefill has answered, and the decode leg has not returned a token yet."""
    DECODING = auto()
    """The leg that answers runs without a hand-off, and the client has no token yet."""
    STREAMING = auto()
    """The client has a part of the answer."""
    RESUMING = auto()
    """The stream broke, and another try continues it."""
    DONE = auto()
    """The request has ended, with an answer or without."""

    __hash__ = object.__hash__  # `Enum.__hash__` is a Python function, and would be called several times a request


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
    """One client request from its first byte to its end. Durations are seconds; times of events are `time.monotonic`.

    Attributes:
        model: the engines' name of the model.
        alias: the client's name of the model, where that is another one.
        outcome: `ok`, `client_gone`, or the `code` of the error that ended it.
        stage: the stage of its life; only `reach` changes it.
        stage_before: the stage before the last try's placement, or before the end.
        prefill, decode: URLs of the backends of the last try; `mixed` or local decode leaves prefill empty.
            An answer that prefill gave alone leaves decode empty.
        decode_pool: `decode` or `mixed`; `prefill` for an answer that prefill gave alone.
        tries: how often the request was placed.
        leg: the X-Request-Id of the last try's legs, which begins with the request's own id where the connector allows.
        answer: the id that the engine was asked to give its answer, where its API ignores X-Request-Id; else empty.
        peer: address and port of the client's connection; None where it has none.
        trace: the client's trace context, as header lines for the legs; empty where it sent none.
        client: the name of the client whose key the request has; empty where it has no known key.
        admitted: admission let it start.
        queued_seconds: how long it waited in the queue, until it was admitted or refused, or the client left.
        refused: the code of the error with which admission refused it, or empty.
        best_effort: it could no longer meet its target, and was queued behind requests that could.
        retries: (leg, reason) of every try that failed and was followed by another.
        first_token_from: `prefill` or `decode`, by which engine of the pair the client's first token came; else empty.
        first_token_reason: the reason for that, in the words of `docs/first-token.md`.
        second_token: when decode's first token came, where the client's first one was prefill's.
        handoff_gap: seconds between these two tokens; None where the stream broke between them.
        resumes: the reason why the stream broke, for each time that it was continued on other backends.
        resume_gaps: for each of these times, seconds between the last token before and the first one after.
        not_resumed: why a broken stream could not be continued, or empty.
        fallback: why the request was served without a hand-off, or empty.
        sequence: the number of the last event that the client was sent, where its API numbers events; else -1.
        tokens: completion tokens by the engine's count; where it reported none, the number of token events.
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
        """The id of the client's trace, or an empty string."""
        return self.trace[16:48].decode("latin-1")

    @property
    def known_as(self) -> dict[str, Any]:
        """`extra` of a log line about this request: the ids by which its client and the engines know it."""
        return self.known_by(self.leg)

    def known_by(self, leg: str) -> dict[str, Any]:
        """As `known_as`, for a log line about the legs of an earlier try."""
        names = {"id": self.request_id, "route": self.endpoint, "leg": leg, "answer": self.answer}
        names["trace_id"] = self.trace_id
        members = {name: value for name, value in names.items() if value}
        return {"fields": {name: members[name] for name in ("leg", "answer") if name in members}, "members": members}

    def reach(self, stage: Stage) -> None:
        """Change the stage. `placed` and `end` call it for the stages PLACED and DONE.

        Raises:
            ImpossibleTransition: the stage cannot follow the present one.
        """
        self.stage = TRANSITIONS[self.stage][stage]

    @property
    def where(self) -> str:
        """The stage in the words of logs and metrics: `admission`, `encode`, `prefill`, `decode` (before the first
        token), `stream` (after it). While the request is PLACED, and after its end, it is the stage before."""
        stage = self.stage
        return _WHERE[self.stage_before if stage is Stage.PLACED or stage is Stage.DONE else stage]

    def end(self, now: float) -> None:
        """End the request, with an answer or without."""
        self.ended = now
        if self.stage is not Stage.PLACED:
            self.stage_before = self.stage
        self.reach(Stage.DONE)

    def placed(self, pool: str, backend: str, prefill: str = "") -> None:
        """Begin a try: set its backends, and drop the durations and counts of the tries before it.

        Arguments:
            pool, backend: the backend that answers, and its pool.
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
        """The time to first token, as the client saw it."""
        return None if self.first_token is None else self.first_token - self.started

    @property
    def tpot(self) -> float | None:
        """(last token - first token) / (tokens - 1), for streams of two tokens or more: decode's time per token. Where
        the first token was prefill's, decode's first one takes its place, and the time between is `handoff_gap`.

        The last token counts from when it was read, and the first from when it was sent. Where one read brought both,
        the latter is later, and the result is 0.
        """
        first, last, tokens = self.first_token, self.last_token, self.tokens
        if self.second_token is not None:
            first, tokens = self.second_token, tokens - 1
        return None if first is None or last is None or tokens < 2 else max(0.0, last - first) / (tokens - 1)


class PrefixCounts:
    """Prompt tokens that were expected in prefix caches, and those that engines reported to have found there.

    Both count only answers that report cached tokens. Their ratio shows how good the prefix index is.
    """

    __slots__ = ("cached", "expected")

    def __init__(self) -> None:
        self.expected: Counter[tuple[str, str]] = Counter()
        self.cached: Counter[tuple[str, str]] = Counter()

    def note(self, pool: str, backend: str, expected: int, cached: int) -> None:
        """Count one prompt whose engine has reported the tokens that it found cached.

        Arguments:
            pool, backend: the backend that computed the prompt, and its pool.
            expected, cached: tokens.
        """
        key = (pool, backend)
        self.expected[key] += expected
        self.cached[key] += cached

    def forget(self, backend: str) -> None:
        """Drop the counts of a backend that has left for good."""
        for counter in (self.expected, self.cached):
            for key in [key for key in counter if key[1] == backend]:
                del counter[key]


class Sink(Protocol):
    """Takes the records of requests."""

    def finished(self, record: RequestRecord) -> None:
        """Take the record of a request that has ended. Must not raise."""


class Telemetry(Sink, Protocol):
    """What the flow and the relay need of telemetry."""

    def gaps(self, pool: str, backend: str) -> Distribution:
        """The distribution of the gaps between the tokens of a backend's streams."""

    def handoff_released(self, claimed: bool) -> None:
        """Count a hand-off that no request needs any more.

        Arguments:
            claimed: prefill's blocks were freed; else they are left to expire.
        """


class Sinks:
    """Several sinks as one `Telemetry`. The first one keeps the gaps and counts the released hand-offs."""

    def __init__(self, first: Telemetry, *others: Sink) -> None:
        self.gaps = first.gaps
        self.handoff_released = first.handoff_released
        self._finished = [sink.finished for sink in (first, *others)]

    def finished(self, record: RequestRecord) -> None:
        for finished in self._finished:
            try:
                finished(record)
            except Exception:  # the other sinks still need the record
                log.exception("%s: a sink failed on this request's record", record.request_id, extra=record.known_as)
