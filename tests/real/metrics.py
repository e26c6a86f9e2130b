"""A Prometheus page as numbers by name."""

from __future__ import annotations

from collections.abc import Collection

from prometheus_client.parser import text_string_to_metric_families


def series(page: str, prefix: str, *, without: Collection[str] = ()) -> dict[str, float]:
    """Every series whose name has `prefix`, by its name without the prefix and its labels except those in `without`.

    For example `{'kv_cache_usage_perc': 0.0, 'prompt_tokens_by_source_total{source="local_compute"}': 12.0}`.
    """
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name.startswith(prefix):
                labels = [f'{name}="{value}"' for name, value in sorted(sample.labels.items()) if name not in without]
                key = sample.name.removeprefix(prefix) + (f"{{{','.join(labels)}}}" if labels else "")
                found[key] = sample.value
    return found
