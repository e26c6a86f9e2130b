"""The old names of metrics that were renamed in 0.4.0, which remain for one release.

They are shown where `metrics.old_names` is on. To end the transition, delete this file and its uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class OldName:
    """A metric's name, labels and label values before it was renamed.

    Attributes:
        name: the old name; for a counter without `_total`.
        labels: new label -> old label, where they differ.
        values: new label value -> old label value, where they differ.
    """

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)


OLD_NAMES = {
    "pd_proxy_handoffs_pending": OldName("pd_proxy_handoffs_in_limbo"),
    "pd_proxy_handoffs_abandoned": OldName(
        "pd_proxy_handoffs_released", values={"released": "claimed", "left_to_expire": "left"}
    ),
    "pd_proxy_backend_handoff_verified": OldName("pd_proxy_backend_handed_over"),
    "pd_proxy_pair_warmups": OldName("pd_proxy_warmups", labels={"result": "found"}),
    "pd_proxy_health_checks_ignored": OldName(
        "pd_proxy_health_checks_excused",
        labels={"reason": "cause"},
        values={"mass_failure": "mass", "gateway_delayed": "late"},
    ),
    "pd_proxy_prefix_index_invalidations": OldName("pd_proxy_prefix_index_forgotten"),
    "pd_proxy_backend_decode_step_ratio": OldName("pd_proxy_backend_step_slowness"),
}
"""The old names, by the new name of the metric."""


class WithOldNames(Collector):
    """Shows a collector's metrics, and the renamed ones under their old names too."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def collect(self) -> Iterator[Metric]:
        for family in self._collector.collect():
            yield family
            if (old := OLD_NAMES.get(family.name)) is not None:
                yield _renamed(family, old)

    def describe(self) -> Iterable[Metric]:
        return ()


def _renamed(family: Metric, old: OldName) -> Metric:
    renamed = Metric(old.name, f"Deprecated: use {family.name}. {family.documentation}", family.type)
    for sample in family.samples:
        labels = {old.labels.get(label, label): old.values.get(value, value) for label, value in sample.labels.items()}
        renamed.samples.append(sample._replace(name=sample.name.replace(family.name, old.name, 1), labels=labels))
    return renamed
