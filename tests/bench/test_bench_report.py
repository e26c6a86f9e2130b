"""Medians, ratios, budgets and tables show what was measured."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from bench import __main__ as command
from bench import report
from bench.cases import ALL, BY_NAME, Budget, Case
from bench.cost import PEERS, Contender, Measurement, gateway_argv
from bench.process import BenchError

ZERO = Measurement(**dict.fromkeys((field.name for field in fields(Measurement)), 0.0))
PACED, SHORT, FLOOD = BY_NAME["paced"], BY_NAME["short"], BY_NAME["flood"]


def tokens_cost(*costs: float) -> list[Measurement]:
    return [replace(ZERO, cpu_per_token=cost, ok=576) for cost in costs]


def only(case: Case, gateway: list[Measurement], nginx: list[Measurement]) -> report.Comparison:
    (one,) = report.compare(case, {"nginx": nginx, "pd-proxy": gateway})
    return one


def test_the_ratio_is_the_median_of_ratios_taken_within_a_round() -> None:
    one = only(PACED, tokens_cost(10, 40, 12), tokens_cost(10, 20, 10))
    assert one.ratios == (1.0, 2.0, 1.2)
    assert one.ratio == 1.2


def test_numbers_are_medians_of_the_rounds() -> None:
    one = only(PACED, tokens_cost(10, 40, 12), tokens_cost(10, 20, 10))
    assert (one.gateway.cpu_per_token, one.nginx.cpu_per_token) == (12, 10)


def test_cases_of_requests_are_judged_by_the_cost_of_a_request() -> None:
    run = [replace(ZERO, cpu_per_token=1, cpu_per_request=100)]
    assert only(SHORT, run, [replace(ZERO, cpu_per_token=1, cpu_per_request=20)]).ratio == 5


def test_failed_requests_are_summed_so_that_no_round_hides_them() -> None:
    assert report.median([replace(ZERO, failed=0), replace(ZERO, failed=3), replace(ZERO, failed=0)]).failed == 3


@pytest.mark.parametrize(("cost", "holds"), [(13.5, True), (13.6, False)])
def test_the_budget_of_paced_is_its_ratio(cost: float, holds: bool) -> None:
    assert only(PACED, tokens_cost(cost), tokens_cost(10)).holds is holds


@pytest.mark.parametrize(("cpu_us", "ratio", "holds"), [(160, 9, True), (400, 5, True), (161, 5.1, False)])
def test_a_budget_holds_when_either_bound_does(cpu_us: float, ratio: float, holds: bool) -> None:
    assert Budget(ratio=5, cpu_us=160).holds(cpu_us, ratio) is holds


def test_a_budget_is_missed_when_a_request_failed() -> None:
    assert only(PACED, [replace(ZERO, cpu_per_token=1, failed=1)], tokens_cost(10)).holds is False


def test_a_case_without_budget_neither_holds_nor_fails() -> None:
    assert only(FLOOD, tokens_cost(50), tokens_cost(10)).holds is None


def test_the_tables_align_and_name_budget_and_verdict() -> None:
    one = only(PACED, tokens_cost(14), tokens_cost(10))
    text = str(report.cost_table([one]))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    assert "≤ 1.35 x nginx" in rows[-1]
    assert rows[-1].endswith("| NO    |")


def test_ttft_overhead_is_the_gateways_ttft_minus_that_of_nginx() -> None:
    gateway, nginx = replace(ZERO, ttft_p50=5000, ttft_p99=9000), replace(ZERO, ttft_p50=2000, ttft_p99=3000)
    assert "| 3.00 / 6.00" in str(report.delay_table([only(SHORT, [gateway], [nginx])]))


def test_the_results_file_names_machine_loads_and_every_case() -> None:
    measured = {case.name: {"nginx": tokens_cost(10), "pd-proxy": tokens_cost(12)} for case in ALL}
    text = report.as_markdown(ALL, measured, {"machine": "2 cores"})
    assert "- machine: 2 cores" in text
    assert all(case.what in text for case in ALL)


def test_the_json_holds_every_round() -> None:
    measured = {"paced": {"nginx": tokens_cost(10, 20), "pd-proxy": tokens_cost(12, 24)}}
    again = json.loads(json.dumps(report.as_json([PACED], measured, {})))
    assert [run["cpu_per_token"] for run in again["cases"]["paced"]["rounds"]["pd-proxy"]] == [12, 24]
    assert again["cases"]["paced"]["compared"]["pd-proxy"]["ratio"] == pytest.approx(1.2)


def test_a_quick_run_keeps_the_concurrency_and_the_budget() -> None:
    for case in ALL:
        quick = case.quick()
        assert (quick.concurrency, quick.budget, quick.tick_us) == (case.concurrency, case.budget, case.tick_us)
        assert quick.requests * quick.tokens < case.requests * case.tokens


def test_a_command_is_filled_in_and_may_hold_json(tmp_path) -> None:
    contender = Contender("other", """other --port {port} --decode {decode} --more '{"a": 1}'""")
    argv = gateway_argv(contender, tmp_path, 1, 2, 3)
    assert argv == ["other", "--port", "1", "--decode", "http://127.0.0.1:3", "--more", '{"a": 1}']


def test_peers_are_measured_only_when_asked_for_and_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert len(command.contenders(command.options([]))) == 2
    assert command.contenders(command.options(["--peers"]))[2:] == list(PEERS)


def test_without_nginx_the_bench_says_how_to_install_it_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> str:
        raise BenchError("nginx is not installed: apt-get install nginx-light")

    monkeypatch.setattr(command, "nginx_path", missing)
    monkeypatch.setattr(command.sys, "argv", ["bench"])
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    assert command.main() == 2
    assert "apt-get install nginx-light" in capsys.readouterr().err
