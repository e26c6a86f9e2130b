"""What the engine counts, and how vLLM 0.32 exposes it at /metrics.

Invariant: counters only grow; gauges are read from the engine when they are scraped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Histogram:
    """Cumulative buckets, sum and count."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Iterable[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Add one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: str) -> list[str]:
        """The exposition lines, without type and help."""
        lines = []
        total = 0
        for bound, count in zip((*map(float, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {float(total)}')
        lines.append(f"{name}_count{{{labels}}} {float(total)}")
        lines.append(f"{name}_sum{{{labels}}} {self._sum}")
        return lines


class Stats:
    """Everything that one engine has counted since it started."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.local_compute = 0
        self.local_cache_hit = 0
        self.external_kv_transfer = 0
        self.generation_tokens = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.external_queries = 0
        self.external_hits = 0
        self.preemptions = 0
        self.admission_rejections = 0
        self.finished = dict.fromkeys(("stop", "length", "abort", "error", "repetition"), 0)
        self.aborted = 0  # vLLM does not count aborts by disconnect in request_success; this one is for tests
        self.pulls = 0  # hand-offs read, counted at decode
        self.failed_transfers = 0
        self.failed_notifications = 0
        self.steps = 0
        self.transfer_time = Histogram(_TTFT)
        self.time_to_first_token = Histogram(_TTFT)
        self.inter_token_latency = Histogram(_ITL)
        self.end_to_end = Histogram(_REQUEST)
        self.queue_time = Histogram(_REQUEST)
        self.prompt_length = Histogram(_TOKENS)
        self.output_length = Histogram(_TOKENS)


class Exposition:
    """Collects one page of Prometheus text."""

    def __init__(self, labels: str) -> None:
        self._labels = labels
        self._lines: list[str] = []

    def gauge(self, name: str, value: float, extra: str = "") -> None:
        """Add one gauge."""
        self._one(name, "gauge", [(name, extra, value)])

    def counter(self, name: str, value: float | dict[str, float], label: str = "") -> None:
        """Add one counter, or one for each value of `label`."""
        rows = {"": value} if not isinstance(value, dict) else value
        self._one(
            name, "counter", [(f"{name}_total", f'{label}="{key}"' if label else "", n) for key, n in rows.items()]
        )

    def histogram(self, name: str, histogram: Histogram) -> None:
        """Add one histogram."""
        self._lines.append(f"# HELP {name} {name}\n# TYPE {name} histogram")
        self._lines.extend(histogram.lines(name, self._labels))

    def _one(self, name: str, kind: str, rows: list[tuple[str, str, float]]) -> None:
        self._lines.append(f"# HELP {name} {name}\n# TYPE {name} {kind}")
        for shown, extra, value in rows:
            labels = ",".join(part for part in (self._labels, extra) if part)
            self._lines.append(f"{shown}{{{labels}}} {float(value)}")

    def text(self) -> str:
        """The page."""
        return "\n".join(self._lines) + "\n"
