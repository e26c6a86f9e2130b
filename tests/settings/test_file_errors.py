"""What a settings file may say, and the messages about what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest
from pd_proxy.settings.load import configure

from tests.settings.helpers import Write, wrong

# One name twice, and names with their group before them


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port: 1\nhost: a\nport: 2", "gateway.yaml:3: port: it is set in line 1 already"),
        ('port: 1\n"port": 1', "gateway.yaml:2: port: it is set in line 1 already"),
        ("timeouts: {idle: 1, connect: 2, idle: 3}", "gateway.yaml:1: timeouts.idle: it is set in line 1 already"),
        ("timeouts:\n  idle: 1\ntimeouts:\n  total: 1", "gateway.yaml:3: timeouts: it is set in line 1 already"),
        ("timeouts:\n  idle: 1\ntimeouts.idle: 1", "gateway.yaml:3: timeouts.idle: it is set in line 2 already"),
        ("timeouts.idle: 1\ntimeouts.idle: 1", "gateway.yaml:2: timeouts.idle: it is set in line 1 already"),
        ("clients:\n- name: a\n  key: k\n  name: b", "gateway.yaml:4: clients.0.name: it is set in line 2 already"),
        ("aliases: {a: b, a: c}", "gateway.yaml:1: aliases.a: it is set in line 1 already"),
    ],
)
def test_a_setting_that_a_file_has_twice_is_refused_with_both_lines(write: Write, text: str, said: str) -> None:
    assert wrong({}, write(text)) == [said]


def test_every_line_that_repeats_a_setting_is_reported(write: Write) -> None:
    assert len(wrong({}, write("port: 1\nport: 2\nport: 3\nhost: a\nhost: b"))) == 3


@pytest.mark.parametrize(
    "text",
    [
        "timeouts.idle: 7\ntimeouts.connect: 2",
        "timeouts.idle: 7\ntimeouts: {connect: 2}",
        "timeouts: {connect: 2}\ntimeouts.idle: 7",
        "timeouts:\ntimeouts.idle: 7\ntimeouts.connect: 2",
    ],
)
def test_a_name_in_a_file_may_have_its_group_before_it(write: Write, text: str) -> None:
    timeouts = configure({}, write(text), {}).timeouts
    assert (timeouts.idle, timeouts.connect, timeouts.prefill) == (7.0, 2.0, 300.0)


def test_an_error_in_a_name_with_its_group_is_reported_with_its_line(write: Write) -> None:
    assert wrong({}, write("port: 1\ntimeouts.idle: no")) == [
        "gateway.yaml:2: timeouts.idle: must be a number, not false"
    ]
    assert wrong({}, write("timeouts.idel: 1")) == [
        "gateway.yaml:1: timeouts.idel: no such setting (did you mean timeouts.idle?)"
    ]
    assert wrong({}, write("timeouts: 5\ntimeouts.idle: 1")) == [
        "gateway.yaml:1: timeouts: must be a group of settings, a mapping of names to values, not 5"
    ]


def test_dots_in_the_names_of_models_are_no_groups(write: Write) -> None:
    assert configure({}, write("aliases: {gpt-4.1: org/m-1.5}"), {}).aliases == {"gpt-4.1": "org/m-1.5"}


# Messages in plain words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("timeouts: [1]", "timeouts: must be a group of settings, a mapping of names to values, not a list"),
        ("timeouts: 5", "timeouts: must be a group of settings, a mapping of names to values, not 5"),
        ("prefill: 5", "prefill: must be a list, not 5"),
        ("prefill: {a: 1}", "prefill: must be a list, not a mapping"),
        ("prefill: [5]", "prefill: must be text, not 5; put it in quotes"),
        ("prefill:", "prefill: has no value; leave the line out to have the default"),
        ("port:", "port: has no value; leave the line out to have the default"),
        ("port: eight", "port: must be a whole number, not 'eight'"),
        ("port: 80.5", "port: must be a whole number, not 80.5"),
        ("port: true", "port: must be a number, not true"),
        ("port: -1", "port: must be at least 0, not -1"),
        ("timeouts.idle: 30s", "timeouts.idle: must be a number, not '30s' (without a unit)"),
        ("timeouts.idle: 0", "timeouts.idle: must be above 0, not 0"),
        ("timeouts.idle: .inf", "timeouts.idle: must be a finite number, not inf"),
        ("timeouts.idle: .nan", "timeouts.idle: must be a finite number, not nan"),
        ("timeouts.idle: 1e+300", "timeouts.idle: must be at most 31622400, not '1e+300'"),
        ("shutdown.grace: .inf", "shutdown.grace: must be a finite number, not inf"),
        ("access_log: maybe", "access_log: must be true or false, not 'maybe'"),
        ("log_level: loud", "log_level: must be debug, info, warning or error, not 'loud'"),
        ("default_model: 7", "default_model: must be text, not 7; put it in quotes"),
        ("default_model: 2026-01-01", "default_model: must be text, not 2026-01-01"),
        ("api_keys: [424242]", "api_keys: must be text; put it in quotes"),
        ("admin_key: [a]", "admin_key: must be text"),
        ("host: ''", "host: must not be empty; all addresses are 0.0.0.0"),
        ("host: '*'", "host: all addresses are 0.0.0.0, or :: for IPv6"),
        ("host: 0.0.0.0:8000", "host: '0.0.0.0:8000': must be only a host, without scheme and port"),
        ("host: http://a", "host: 'http://a': must be only a host, without scheme and port"),
        ("host: 10.0.0.256", "host: 10.0.0.256 is not an IP address"),
        ("decode: ['http:/a:1']", "decode: 'http:/a:1': the scheme must be followed"),
        ("metrics.port: 8000", "metrics.port: 8000 is taken by port"),
        ("port: 9100\nmetrics.port: 9100", "metrics.port: 9100 is taken by port"),
        ("kind: openai\nprefill: [a:1]\ndecode: [b:1]", "kind: backends of kind openai have no hand-off"),
        ("breaker.ejection: 400", "breaker.ejection: it is above breaker.longest_ejection"),
        ("breaker.longest_ejection: 1", "breaker.ejection: it is above breaker.longest_ejection"),
        ("connector: ascend_layerwise", "metaserver.url: decode engines that speak ascend_layerwise call"),
        ("groups: [{name: g, connector: ascend_layerwise}]", "metaserver.url: decode engines that speak"),
        ("unknown_model: default", "unknown_model: default needs a default_model"),
        ("8000: port", "8000: a name is text; put it in quotes"),
        ("on: true", "on: a name is text; put it in quotes"),
        ("host: ${HOST}", "host: ${HOST} is not replaced by a variable; set PD_PROXY_HOST, which overrides"),
        ("decode: ['${D:-a:1}']", "decode: ${D:-a:1} is not replaced by a variable; set PD_PROXY_DECODE"),
        ("admin_key: ${KEY}", "admin_key: ${KEY} is not replaced by a variable; set PD_PROXY_ADMIN_KEY"),
        ("default_model: 2026-13-45", "2026-13-45 is neither a date nor a number; put text in quotes"),
    ],
)
def test_errors_are_reported_in_plain_words_with_their_line(write: Write, text: str, said: str) -> None:
    (line,) = wrong({}, write(text))
    where, _, words = line.partition(": ")
    assert where.startswith("gateway.yaml:")
    assert words.startswith(said)
    assert "nput should" not in line
    assert "pydantic" not in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"timeouts:\n\tidle: 1", "gateway.yaml:2:1: not YAML: a tab; YAML is indented with spaces"),
        (
            b"port: 1\n---\nport: 2",
            "gateway.yaml:2:1: not YAML: a second document begins; a settings file has only one",
        ),
        (b"host: a\nport: \x07", "gateway.yaml:2: not YAML: a control character"),
        (b"host: a\nport: 1 # caf\xe9", "gateway.yaml:2: it is not UTF-8 text"),
        ("port: 1".encode("utf-16"), "gateway.yaml: it is UTF-16, and not UTF-8 text"),
        (b"[" * 500, "gateway.yaml: it is nested too deeply"),
        (b"a: &x [*x]", "gateway.yaml:1: a.0: it contains itself"),
        (
            b"port: " + b"1" * 5000,
            "gateway.yaml:1: " + "1" * 37 + "\u2026 is neither a date nor a number; put text in quotes",
        ),
    ],
)
def test_unreadable_content_of_a_file_is_reported_with_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_bytes(content)
    assert wrong({}, path)[0] == said


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_bytes("port: 7\n".encode("utf-8-sig"))
    assert configure({}, path, {}).port == 7


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("log_level: INFO", "log_level", "info"),
        ("log_level: Warning", "log_level", "warning"),
        ("log_level: WARN", "log_level", "warning"),
        ("log_level: CRITICAL", "log_level", "error"),
        ("log_format: JSON", "log_format", "json"),
        ("connector: NIXL", "connector", "nixl"),
        ("connector: mooncake-ascend", "connector", "mooncake_ascend"),
        ("kind: vLLM", "kind", "vllm"),
        ("fallback: local-prefill", "fallback", "local_prefill"),
        ("resume: off", "resume", "off"),
        ("resume: OFF", "resume", "off"),
    ],
)
def test_words_may_be_in_any_case_and_off_stays_a_word(write: Write, text: str, name: str, value: str) -> None:
    assert getattr(configure({}, write(text), {}), name) == value
