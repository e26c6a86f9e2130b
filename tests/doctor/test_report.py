"""A report as text and as JSON."""

from __future__ import annotations

import json

import pytest
from pd_proxy.doctor.report import WIDTH, Engine, Handoff, Report
from pd_proxy.fleet.findings import Finding, found

ENGINE = Engine(
    url="http://10.0.0.1:8000",
    role="prefill",
    group="default",
    kind="vllm",
    state="up",
    says="prefill",
    version="0.32.0",
    connector="nixl",
    tells=("NixlConnector",),
    block_size=16,
    context=32768,
    prefix_caching=True,
    tp=1,
    models=("m",),
)
HANDOFF = Handoff("default", "http://10.0.0.1:8000", "http://10.0.0.2:8000", "ok", "10.0.0.1:5600", True, 0.1234567)


def test_a_table_is_as_wide_as_its_content() -> None:
    assert Report((ENGINE,), (HANDOFF,), (), 1).as_text() == (
        "ROLE     BACKEND        STATE  SAYS     VERSION  CONNECTOR  BLOCK  CONTEXT  CACHE  TP  MODELS\n"
        "prefill  10.0.0.1:8000  up     prefill  0.32.0   nixl       16     32768    on     1   m\n"
        "\n"
        "PREFILL        DECODE         HAND-OFF  SIDE CHANNEL   FROM HERE\n"
        "10.0.0.1:8000  10.0.0.2:8000  ok        10.0.0.1:5600  reachable\n"
        "\n"
        "1 engine, 1 hand-off tried of 1 pair: all is well.\n"
    )


def test_no_line_is_longer_than_the_width_whatever_engines_are_called() -> None:
    long = "x" * 150
    url = f"https://{long}.example/{long}"
    engine = Engine(url, "prefill", "default", "vllm", "up", "prefill", long, "mooncake_ascend", models=(long, long))
    handoff = Handoff("default", url, url, "prefill_failed", f"{long}:65535", False)
    findings = [found("refused", f"{url} is not up {long}", url), found("not_tried", "x", severity="warning")]
    text = Report((engine,), (handoff,), tuple(findings)).as_text()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "up" in text and "prefill_failed" in text and "unreachable" in text


def test_engines_write_no_control_characters_on_a_terminal() -> None:
    engine = Engine("http://a", "prefill", "default", "vllm", "up", version="1\x1b[31m", models=("m\n\r", "\u202e"))
    text = Report((engine,), (), (found("failed", "said \x07 and \x9b1m", "http://a"),)).as_text()
    assert all(letter.isprintable() for line in text.split("\n") for letter in line)


@pytest.mark.parametrize(
    ("severities", "status"),
    [((), 0), (("note",), 0), (("warning", "note"), 1), (("note", "fault", "warning"), 2)],
)
def test_the_exit_status_is_that_of_the_most_severe_finding(severities: tuple[str, ...], status: int) -> None:
    findings = tuple(Finding("failed", severity, (), "x", "y") for severity in severities)  # type: ignore[arg-type]
    assert Report((), (), findings).exit_status == status


def test_the_json_has_the_whole_report() -> None:
    finding = found("refused", "http://a is not up", "http://a")
    said = json.loads(Report((ENGINE,), (HANDOFF,), (finding,), 4).as_json())
    assert said["exit_status"] == 2
    assert said["pairs"] == 4
    assert said["engines"][0]["tells"] == ["NixlConnector"]
    assert said["engines"][0]["prefix_caching"] is True
    assert said["handoffs"][0] == {
        "group": "default",
        "prefill": "http://10.0.0.1:8000",
        "decode": "http://10.0.0.2:8000",
        "found": "ok",
        "side": "10.0.0.1:5600",
        "reachable": True,
        "seconds": 0.123,
    }
    assert said["findings"] == [
        {
            "code": "refused",
            "severity": "fault",
            "backends": ["http://a"],
            "what": "http://a is not up",
            "advice": finding.advice,
        }
    ]
