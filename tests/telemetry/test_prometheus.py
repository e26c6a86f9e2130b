"""The metrics of the Prometheus sink."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy import __version__
from pd_proxy.errors import BackendCut
from pd_proxy.fleet.backend import Lease
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.view import FleetView
from pd_proxy.http.client_connections import Connections
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.families import Histogram
from pd_proxy.telemetry.prometheus import PrometheusSink, registry
from pd_proxy.telemetry.records import TTFT_BOUNDS, Distribution, RequestRecord, Sinks, Stage
from prometheus_client import exposition
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

PREFILL, DECODE, MIXED = "http://prefill0:8000", "http://decode0:8000", "http://mixed0:8000"

NAMES = {
    "pd_proxy_time_to_first_token_seconds": ("histogram", {"pool", "backend"}),
    "pd_proxy_inter_token_latency_seconds": ("histogram", {"pool", "backend"}),
    "pd_proxy_time_per_output_token_seconds": ("histogram", {"pool", "backend"}),
    "pd_proxy_request_duration_seconds": ("histogram", {"endpoint", "outcome"}),
    "pd_proxy_prefill_duration_seconds": ("histogram", {"pool", "backend"}),
    "pd_proxy_handoff_duration_seconds": ("histogram", {"pool", "backend"}),
    "pd_proxy_handoff_gap_seconds": ("histogram", {"pool", "backend"}),
    "pd_proxy_first_tokens": ("counter", {"source", "reason"}),
    "pd_proxy_event_loop_delay_seconds": ("histogram", set()),
    "pd_proxy_requests": ("counter", {"endpoint", "model", "outcome"}),
    "pd_proxy_tokens": ("counter", {"model", "kind"}),
    "pd_proxy_retries": ("counter", {"leg", "reason"}),
    "pd_proxy_resumes": ("counter", {"reason"}),
    "pd_proxy_resumes_refused": ("counter", {"reason"}),
    "pd_proxy_resume_gap_seconds": ("histogram", set()),
    "pd_proxy_handoffs_abandoned": ("counter", {"outcome"}),
    "pd_proxy_fallbacks": ("counter", {"reason"}),
    "pd_proxy_client_disconnects": ("counter", {"stage"}),
    "pd_proxy_backend_up": ("gauge", {"pool", "backend"}),
    "pd_proxy_backend_handoff_verified": ("gauge", {"pool", "backend"}),
    "pd_proxy_pair_warmups": ("counter", {"result"}),
    "pd_proxy_backend_state": ("gauge", {"pool", "backend", "state"}),
    "pd_proxy_backend_ejections": ("counter", {"pool", "backend", "leg", "reason"}),
    "pd_proxy_backend_open_handoffs": ("gauge", {"pool", "backend"}),
    "pd_proxy_pool_panic": ("gauge", {"pool"}),
    "pd_proxy_retry_budget_refusals": ("counter", {"pool"}),
    "pd_proxy_health_checks_ignored": ("counter", {"reason"}),
    "pd_proxy_engine_messages": ("counter", {"message", "result"}),
    "pd_proxy_backend_inflight_requests": ("gauge", {"pool", "backend"}),
    "pd_proxy_backend_inflight_tokens": ("gauge", {"pool", "backend"}),
    "pd_proxy_handoffs_pending": ("gauge", set()),
    "pd_proxy_client_connections": ("gauge", set()),
    "pd_proxy_client_connections_limit": ("gauge", set()),
    "pd_proxy_client_connections_refused": ("counter", set()),
    "pd_proxy_request_body_bytes": ("gauge", set()),
    "pd_proxy_request_body_bytes_limit": ("gauge", set()),
    "pd_proxy_request_bodies_refused": ("counter", {"reason"}),
    "pd_proxy_log_lines_dropped": ("counter", set()),
    "pd_proxy_group_ready": ("gauge", {"group"}),
    "pd_proxy_ready": ("gauge", set()),
    "pd_proxy_build_info": ("gauge", {"version"}),
}


class Scene:
    """A fleet of three backends that have named the model `m`, and its sink."""

    def __init__(self) -> None:
        self.fleet = Fleet(Settings(prefill=[PREFILL], decode=[DECODE], mixed=[MIXED]))
        for backend in self.fleet:
            backend.models = {"m": {"id": "m"}}
        self.sink = PrometheusSink(FleetView(self.fleet), Connections())
        self.registry = registry(self.sink)

    def finish(self, **fields: Any) -> None:
        """Finish one request; by default one that a pair has served."""
        self.sink.finished(RequestRecord(**{**GOOD, **fields}))

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def series(self, name: str) -> list[dict[str, str]]:
        """The labels of all samples of a metric."""
        return [s.labels for family in self.registry.collect() for s in family.samples if s.name == name]


GOOD: dict[str, Any] = {
    "endpoint": "chat",
    "request_id": "1",
    "model": "m",
    "stream": True,
    "started": 100.0,
    "ended": 101.0,
    "status": 200,
    "outcome": "ok",
    "stage": Stage.STREAMING,
    "prefill": PREFILL,
    "decode": DECODE,
    "prefill_seconds": 0.02,
    "handoff_seconds": 0.003,
    "first_token": 100.03,
    "last_token": 100.99,
    "prompt_tokens": 20,
    "cached_tokens": 16,
    "tokens": 97,
}


@pytest.fixture
def scene() -> Scene:
    return Scene()


def fill(scene: Scene) -> None:
    """Record one of everything that the sink counts."""
    scene.fleet.outlier_detector.ejections["decode", DECODE, "decode", "slow"] += 1
    scene.fleet.budgets.refusals["decode"] += 1
    scene.fleet.messages["notice"] = {"taken": 1}
    scene.finish()
    scene.finish(outcome="client_gone", retries=[("prefill", "cut")], fallback="no_handoff_params")
    scene.finish(first_token_from="prefill", first_token_reason="exact", second_token=0.5, handoff_gap=0.3)
    scene.finish(resumes=["cut"], resume_gaps=[0.4], not_resumed="too_often")
    scene.sink.handoff_released(True)
    scene.sink.gaps("decode", DECODE).observe(0.02)
    scene.sink.loop_late(0.001)


@pytest.mark.parametrize("shape", ["text", "openmetrics"])
def test_every_metric_is_shown_with_its_labels(scene: Scene, shape: str) -> None:
    fill(scene)
    if shape == "text":
        families = list(parse_text(exposition.generate_latest(scene.registry).decode()))
    else:
        families = list(parse_openmetrics(openmetrics.generate_latest(scene.registry).decode()))
    ours = {family.name: family for family in families if family.name.startswith("pd_proxy_")}
    assert set(ours) == set(NAMES)
    for name, (kind, labels) in NAMES.items():
        family = ours[name]
        assert (family.type, family.documentation != "") == (kind, True), name
        assert family.samples, name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == labels, sample


def test_a_counters_samples_end_in_total(scene: Scene) -> None:
    fill(scene)
    assert "pd_proxy_requests_total{" in exposition.generate_latest(scene.registry).decode()


def test_names_and_types_are_shown_before_the_first_request(scene: Scene) -> None:
    text = exposition.generate_latest(scene.registry).decode()
    for name, (kind, _) in NAMES.items():
        assert f"# TYPE {name}{'_total' if kind == 'counter' else ''} {kind}\n" in text


def test_the_metrics_of_the_process_are_shown_too(scene: Scene) -> None:
    assert scene.value("process_start_time_seconds") is not None
    assert scene.value("pd_proxy_build_info", version=__version__) == 1.0


# What a request counts


def test_a_successful_request_is_counted_in_all_its_metrics(scene: Scene) -> None:
    scene.finish()
    pair = {"pool": "decode", "backend": DECODE}
    first = {"pool": "prefill", "backend": PREFILL}
    expected = {
        ("pd_proxy_requests_total", ("endpoint", "chat", "model", "m", "outcome", "ok")): 1.0,
        ("pd_proxy_request_duration_seconds_sum", ("endpoint", "chat", "outcome", "ok")): 1.0,
    }
    for (name, flat), value in expected.items():
        assert scene.value(name, **dict(zip(flat[::2], flat[1::2], strict=True))) == value
    assert scene.value("pd_proxy_time_to_first_token_seconds_sum", **pair) == pytest.approx(0.03)
    assert scene.value("pd_proxy_time_to_first_token_seconds_sum", **first) == pytest.approx(0.03)
    assert scene.value("pd_proxy_time_per_output_token_seconds_sum", **pair) == pytest.approx(0.01)
    assert scene.value("pd_proxy_prefill_duration_seconds_sum", **first) == pytest.approx(0.02)
    assert scene.value("pd_proxy_handoff_duration_seconds_sum", **pair) == pytest.approx(0.003)
    tokens = {
        kind: scene.value("pd_proxy_tokens_total", model="m", kind=kind) for kind in ("prompt", "cached", "completion")
    }
    assert tokens == {"prompt": 20.0, "cached": 16.0, "completion": 97.0}
    assert scene.series("pd_proxy_retries_total") == []
    assert scene.series("pd_proxy_fallbacks_total") == []
    assert scene.series("pd_proxy_client_disconnects_total") == []


def test_a_mixed_backends_request_has_no_prefill(scene: Scene) -> None:
    scene.finish(prefill="", prefill_seconds=None, handoff_seconds=None, decode=MIXED, decode_pool="mixed")
    assert scene.series("pd_proxy_prefill_duration_seconds_count") == []
    assert scene.series("pd_proxy_handoff_duration_seconds_count") == []
    assert scene.series("pd_proxy_time_to_first_token_seconds_count") == [{"pool": "mixed", "backend": MIXED}]


def test_a_request_that_decode_prefilled_itself_is_no_time_to_first_token_of_the_prefill_pool(scene: Scene) -> None:
    scene.finish(fallback="no_handoff_params")
    assert scene.series("pd_proxy_time_to_first_token_seconds_count") == [{"pool": "decode", "backend": DECODE}]
    assert scene.value("pd_proxy_fallbacks_total", reason="no_handoff_params") == 1.0


def test_a_fallback_that_ended_with_an_error_is_not_counted(scene: Scene) -> None:
    scene.finish(status=502, outcome="backend_failed", fallback="no_prefill_backend")
    assert scene.series("pd_proxy_fallbacks_total") == []


def test_every_failed_try_is_counted_by_leg_and_reason(scene: Scene) -> None:
    scene.finish(retries=[("prefill", "cut"), ("decode", "busy"), ("prefill", "cut")])
    assert scene.value("pd_proxy_retries_total", leg="prefill", reason="cut") == 2.0
    assert scene.value("pd_proxy_retries_total", leg="decode", reason="busy") == 1.0


@pytest.mark.parametrize(
    ("stage", "word"),
    [
        (Stage.QUEUED, "admission"),
        (Stage.PREFILLING, "prefill"),
        (Stage.DECODING, "decode"),
        (Stage.STREAMING, "stream"),
    ],
)
def test_a_client_that_left_is_counted_by_the_stage_of_its_request(scene: Scene, stage: Stage, word: str) -> None:
    scene.finish(outcome="client_gone", stage=stage)
    assert scene.value("pd_proxy_client_disconnects_total", stage=word) == 1.0


def test_a_request_without_tokens_has_no_token_times(scene: Scene) -> None:
    scene.finish(
        outcome="backend_failed", status=502, first_token=None, last_token=None, tokens=0, handoff_seconds=None
    )
    assert scene.series("pd_proxy_time_to_first_token_seconds_count") == []
    assert scene.series("pd_proxy_time_per_output_token_seconds_count") == []


@pytest.mark.parametrize(
    ("first", "last", "tokens", "tpot"),
    [
        *((1.0, 3.0, 5, 0.5), (1.0, 1.0, 2, 0.0), (1.0, 1.0, 1, None), (None, None, 7, None), (1.0, None, 7, None)),
        (2.0, 1.5, 2, 0.0),
    ],
)
def test_time_per_output_token_is_the_mean_gap(
    first: float | None, last: float | None, tokens: int, tpot: float | None
) -> None:
    assert RequestRecord("chat", first_token=first, last_token=last, tokens=tokens).tpot == tpot


# Bounded labels


@given(model=st.text(max_size=30).filter(lambda model: model != "m"))
def test_a_model_that_no_backend_has_named_is_counted_as_other(model: str) -> None:
    scene = Scene()
    scene.finish(model=model)
    assert {labels["model"] for labels in scene.series("pd_proxy_requests_total")} == {"other"}
    assert {labels["model"] for labels in scene.series("pd_proxy_tokens_total")} == {"other"}


def test_before_models_are_known_any_model_is_counted_as_other(scene: Scene) -> None:
    for backend in scene.fleet:
        backend.models = None
    scene.finish(model="m")
    assert scene.series("pd_proxy_requests_total") == [{"endpoint": "chat", "model": "other", "outcome": "ok"}]


def test_a_backend_that_has_left_has_no_series(scene: Scene) -> None:
    fill(scene)
    scene.fleet.remove(DECODE, "decode")
    scene.sink.forget(DECODE)
    assert DECODE not in exposition.generate_latest(scene.registry).decode()
    assert PREFILL in exposition.generate_latest(scene.registry).decode()


def test_a_request_that_ends_after_its_prefill_backend_left_creates_no_series(scene: Scene) -> None:
    scene.fleet.remove(PREFILL, "prefill")  # its leg had ended long before; the stream went on
    scene.sink.forget(PREFILL)
    scene.finish()
    assert PREFILL not in exposition.generate_latest(scene.registry).decode()


# Histograms


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=300))
def test_buckets_count_values_up_to_their_bound(values: list[float]) -> None:
    histogram = Histogram("h", "text", ("l",), TTFT_BOUNDS)
    for value in values:
        histogram.at("x").observe(value)
    samples = {(s.name, s.labels.get("le")): s.value for s in histogram.collect().samples}
    for bound in TTFT_BOUNDS:
        assert samples["h_bucket", repr(bound)] == sum(value <= bound for value in values)
    assert samples["h_bucket", "+Inf"] == samples["h_count", None] == len(values)
    assert samples["h_sum", None] == pytest.approx(sum(values))


def test_a_backend_without_observations_has_no_series() -> None:
    histogram = Histogram("h", "text", ("l",), TTFT_BOUNDS)
    histogram.at("x")
    assert histogram.collect().samples == []


def test_a_distribution_is_the_same_one_for_the_same_labels(scene: Scene) -> None:
    assert scene.sink.gaps("decode", DECODE) is scene.sink.gaps("decode", DECODE)
    assert scene.sink.gaps("decode", DECODE) is not scene.sink.gaps("mixed", DECODE)


def test_gaps_that_the_relay_notes_are_shown(scene: Scene) -> None:
    gaps: Distribution = scene.sink.gaps("decode", DECODE)
    gaps.observe(0.02)
    gaps.counts[0] += 1
    labels = {"pool": "decode", "backend": DECODE}
    assert scene.value("pd_proxy_inter_token_latency_seconds_count", **labels) == 2.0
    assert scene.value("pd_proxy_inter_token_latency_seconds_bucket", **labels, le="0.001") == 1.0
    assert scene.value("pd_proxy_inter_token_latency_seconds_bucket", **labels, le="0.02") == 2.0


# Gauges


def test_gauges_show_the_present_state_of_the_fleet(scene: Scene) -> None:
    decode = scene.fleet.pool("decode")[0]
    labels = {"pool": "decode", "backend": DECODE}
    assert scene.value("pd_proxy_backend_up", **labels) == 0.0
    assert scene.value("pd_proxy_ready") == 0.0
    for backend in scene.fleet:
        backend.mark_up()
    scene.fleet.handoffs_pending += 1
    with Lease(decode, 70):
        assert scene.value("pd_proxy_backend_up", **labels) == 1.0
        assert scene.value("pd_proxy_backend_inflight_requests", **labels) == 1.0
        assert scene.value("pd_proxy_backend_inflight_tokens", **labels) == 70.0
        assert scene.value("pd_proxy_ready") == 1.0
        assert scene.value("pd_proxy_handoffs_pending") == 1.0
    assert scene.value("pd_proxy_backend_inflight_requests", **labels) == 0.0
    decode.draining = True
    assert scene.value("pd_proxy_backend_up", **labels) == 0.0


def test_a_backend_is_in_one_state(scene: Scene) -> None:
    def states(url: str) -> dict[str, float | None]:
        pool = url.removeprefix("http://").rstrip("0:8")
        names = ("up", "slow_start", "ejected", "draining", "down")
        return {s: scene.value("pd_proxy_backend_state", pool=pool, backend=url, state=s) for s in names}

    def only(state: str) -> dict[str, float]:
        return {**dict.fromkeys(("up", "slow_start", "ejected", "draining", "down"), 0.0), state: 1.0}

    assert states(DECODE) == only("down")
    for backend in scene.fleet:
        scene.fleet.bring_in(backend)
    assert states(DECODE) == only("up")
    second = scene.fleet.add("http://decode1:8000", "decode")
    scene.fleet.bring_in(second)
    for _ in range(5):
        scene.fleet.failed(scene.fleet.pool("decode")[0], BackendCut("x"), "decode")
    assert states(DECODE) == only("ejected")
    labels = {"pool": "decode", "backend": DECODE}
    assert scene.value("pd_proxy_backend_up", **labels) == 0.0
    assert scene.value("pd_proxy_backend_ejections_total", **labels, leg="decode", reason="consecutive") == 1.0
    assert scene.value("pd_proxy_pool_panic", pool="decode") == 0.0
    scene.fleet.take_out(second, "died")
    assert scene.value("pd_proxy_pool_panic", pool="decode") == 1.0
    scene.fleet.drain(scene.fleet.pool("decode")[0])
    assert states(DECODE) == only("draining")


def test_refused_retries_are_counted(scene: Scene) -> None:
    budgets = scene.fleet.budgets
    while budgets.take("decode") is not None:
        pass
    assert scene.value("pd_proxy_retry_budget_refusals_total", pool="decode") == 1.0


def test_two_gateways_in_one_process_do_not_share_counts() -> None:
    one, two = Scene(), Scene()
    one.finish()
    assert two.series("pd_proxy_requests_total") == []


def test_all_sinks_get_each_record_and_the_first_keeps_the_gaps(scene: Scene) -> None:
    told: list[tuple[str, RequestRecord]] = []

    class Other:
        def finished(self, record: RequestRecord) -> None:
            told.append(("other", record))

    sinks = Sinks(scene.sink, Other())
    record = RequestRecord(**GOOD)
    sinks.finished(record)
    assert told == [("other", record)]
    assert scene.series("pd_proxy_requests_total") != []
    assert sinks.gaps("decode", DECODE) is scene.sink.gaps("decode", DECODE)


def all_text(scene: Scene) -> Iterator[str]:
    yield exposition.generate_latest(scene.registry).decode()
    yield openmetrics.generate_latest(scene.registry).decode()


def test_no_request_id_and_no_error_text_becomes_a_label(scene: Scene) -> None:
    scene.finish(request_id="client-chosen", error="http://10.9.8.7 said no", outcome="backend_failed")
    for text in all_text(scene):
        assert "client-chosen" not in text
        assert "10.9.8.7" not in text
