"""The throughput sink: what was served in an interval, for the log's throughput line."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import monotonic

from pd_proxy.telemetry.records import RequestRecord

_TTFTS = 4096  # the latest times to first token, of which quantiles are computed; 128 kB


class Throughput:
    """Counts what is served between two calls of `look`.

    Arguments:
        streamed: returns the number of tokens in streams so far, without each stream's first one. It counts open
            streams too, so that a long stream does not appear all at once at its end.
    """

    def __init__(self, streamed: Callable[[], int], clock: Callable[[], float] = monotonic) -> None:
        self._streamed = streamed
        self._clock = clock
        self._begin()

    def _begin(self) -> None:
        self._since = self._clock()
        self._before = self._streamed()
        self._requests = self._failed = self._prompt = self._tokens = 0
        self._ttfts: deque[float] = deque(maxlen=_TTFTS)

    def finished(self, record: RequestRecord) -> None:
        self._requests += 1
        if record.outcome not in ("ok", "client_gone"):
            self._failed += 1
        self._prompt += record.prompt_tokens
        first = record.first_token
        if first is not None:
            self._ttfts.append(first - record.started)
            if record.stream:
                self._tokens += 1
        if not record.stream:
            self._tokens += record.tokens

    def look(self, in_flight: int, waiting: int) -> dict[str, float] | None:
        """The figures since the last call; None where nothing was served and nothing is in flight.

        Arguments:
            in_flight, waiting: how many requests are in the gateway now, and how many of them in the queue.
        """
        seconds = max(self._clock() - self._since, 1e-9)
        # The count of a backend is dropped when it leaves, so the total may fall.
        tokens = self._tokens + max(0, self._streamed() - self._before)
        if not (self._requests or tokens or in_flight):
            self._begin()
            return None
        found: dict[str, float] = {
            "seconds": round(seconds, 1),
            "requests": self._requests,
            "failed": self._failed,
            "in_flight": in_flight,
            "waiting": waiting,
            "tokens_per_second": round(tokens / seconds, 1),
            "prompt_tokens_per_second": round(self._prompt / seconds, 1),
        }
        if ordered := sorted(self._ttfts):
            for name, share in (("ttft_p50", 0.5), ("ttft_p95", 0.95)):
                found[name] = round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4)
        self._begin()
        return found
