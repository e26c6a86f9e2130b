"""The kinds of metric that sinks consist of: counters and histograms of requests, and readings of other state.

Each metric is declared once, with its name, text and labels. A scrape collects the metrics in the order of declaration.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from pd_proxy.telemetry.records import Distribution

POOL_BACKEND = ("pool", "backend")
"""The labels of metrics about one backend in one pool."""

Source = TypeVar("Source")

Samples = Iterable[tuple[tuple[str, ...], float]]
"""Label values, each with the value of the metric."""


class Histogram:
    """Distributions by label values.

    Arguments:
        admits: whether a new set of label values may be shown; observations with other label values are discarded.
    """

    __slots__ = ("_admits", "_bounds", "_children", "_help", "_labels", "_name")

    def __init__(
        self,
        name: str,
        text: str,
        labels: tuple[str, ...],
        bounds: tuple[float, ...],
        admits: Callable[[tuple[str, ...]], bool] = lambda values: True,
    ) -> None:
        self._name = name
        self._help = text
        self._labels = labels
        self._bounds = bounds
        self._admits = admits
        self._children: dict[tuple[str, ...], Distribution] = {}

    def at(self, *values: str) -> Distribution:
        """The distribution of one set of label values."""
        child = self._children.get(values)
        if child is None:
            child = Distribution(self._bounds)
            if self._admits(values):
                self._children[values] = child
        return child

    def fold(self) -> None:
        """Count the observations that its distributions have buffered."""
        for child in self._children.values():
            child.fold()

    def observed(self) -> int:
        """The number of observations so far, over all label values that are shown."""
        return sum(sum(child.counts) for child in self._children.values())

    def forget(self, label: str, value: str) -> None:
        """Drop the series with a label value. Call it when no more observations with that value follow."""
        if label in self._labels:
            place = self._labels.index(label)
            for values in [values for values in self._children if values[place] == value]:
                del self._children[values]

    def collect(self) -> Metric:
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        for values, child in self._children.items():
            if values and not any(child.counts):
                continue  # a backend without observations has no series
            buckets, total = [], 0
            for bound, count in zip((*self._bounds, float("inf")), child.counts, strict=True):
                total += count
                buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
            family.add_metric(values, buckets, child.sum)
        return family


class Count:
    """Counters by label values."""

    __slots__ = ("_help", "_labels", "_name", "values")

    def __init__(self, name: str, text: str, labels: tuple[str, ...]) -> None:
        self._name = name
        self._help = text
        self._labels = labels
        self.values: Counter[tuple[str, ...]] = Counter()

    def collect(self) -> Metric:
        return _counter(self._name, self._help, self._labels, self.values.items())


class Families:
    """A sink's histograms and counters, in the order in which they are declared and shown."""

    def __init__(self) -> None:
        self._histograms: list[Histogram] = []
        self._counts: list[Count] = []

    def histogram(
        self,
        name: str,
        text: str,
        bounds: tuple[float, ...],
        labels: tuple[str, ...] = (),
        admits: Callable[[tuple[str, ...]], bool] = lambda values: True,
    ) -> Histogram:
        """Declare a histogram; arguments as of `Histogram`."""
        made = Histogram(name, text, labels, bounds, admits)
        self._histograms.append(made)
        return made

    def count(self, name: str, text: str, *labels: str) -> Count:
        """Declare a counter."""
        made = Count(name, text, labels)
        self._counts.append(made)
        return made

    def fold(self) -> None:
        """Count the observations that the histograms have buffered."""
        for histogram in self._histograms:
            histogram.fold()

    def forget(self, label: str, value: str) -> None:
        """Drop the histograms' series with a label value."""
        for histogram in self._histograms:
            histogram.forget(label, value)

    def collect(self) -> Iterator[Metric]:
        for histogram in self._histograms:
            yield histogram.collect()
        for count in self._counts:
            yield count.collect()


@dataclass(frozen=True, slots=True)
class Reading(Generic[Source]):
    """A metric whose samples are read from a source at each scrape.

    Attributes:
        name: the metric's name; for a counter without `_total`.
        read: returns the samples of a source.
    """

    make: Callable[[str, str, tuple[str, ...], Samples], Metric]
    name: str
    text: str
    labels: tuple[str, ...]
    read: Callable[[Source], Samples]

    def collect(self, source: Source) -> Metric:
        return self.make(self.name, self.text, self.labels, self.read(source))


def gauge(name: str, text: str, read: Callable[[Source], float]) -> Reading[Source]:
    """A reading of one number that may rise and fall."""
    return Reading(_gauge, name, text, (), lambda source: (((), float(read(source))),))


def counter(name: str, text: str, read: Callable[[Source], float]) -> Reading[Source]:
    """A reading of one number that never falls."""
    return Reading(_counter, name, text, (), lambda source: (((), float(read(source))),))


def gauges(name: str, text: str, labels: tuple[str, ...], read: Callable[[Source], Samples]) -> Reading[Source]:
    """A reading of numbers that may rise and fall, by labels."""
    return Reading(_gauge, name, text, labels, read)


def counters(name: str, text: str, labels: tuple[str, ...], read: Callable[[Source], Samples]) -> Reading[Source]:
    """A reading of numbers that never fall, by labels."""
    return Reading(_counter, name, text, labels, read)


def collect(readings: Iterable[Reading[Source]], source: Source) -> Iterator[Metric]:
    """The metrics of several readings, in their order."""
    return (reading.collect(source) for reading in readings)


def _gauge(name: str, text: str, labels: tuple[str, ...], samples: Samples) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(name: str, text: str, labels: tuple[str, ...], samples: Samples) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family
