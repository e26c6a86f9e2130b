"""From a file, the environment and flags to settings, and what is said when that fails."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.configuration import ConfigurationError, configure

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the settings file."""

    def write(text: str) -> Path:
        path = tmp_path / "gateway.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def wrong(flags: dict[str, Any], file: Path | None = None) -> list[str]:
    """The lines of what is wrong, without the folder of the file."""
    with pytest.raises(ConfigurationError) as caught:
        configure(flags, file, os.environ)
    folder = f"{file.parent}/" if file else "\0"
    return [line.removeprefix(folder) for line in str(caught.value).splitlines()]


# Precedence


def test_flags_win_over_the_environment_and_the_environment_over_the_file(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write("port: 1\nhost: file\nlog_level: debug\nfallback: reject")
    monkeypatch.setenv("PD_PROXY_PORT", "2")
    monkeypatch.setenv("PD_PROXY_HOST", "environment")
    settings = configure({"port": "3"}, file, os.environ)
    assert (settings.port, settings.host, settings.log_level) == (3, "environment", "debug")
    assert settings.connector == "nixl"


def test_each_member_of_a_group_has_its_own_precedence(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("timeouts:\n  prefill: 1\n  idle: 1\n  connect: 1\n")
    monkeypatch.setenv("PD_PROXY_TIMEOUTS__IDLE", "2")
    monkeypatch.setenv("PD_PROXY_TIMEOUTS__CONNECT", "2")
    timeouts = configure({"timeouts": {"connect": "3"}}, file, os.environ).timeouts
    assert (timeouts.prefill, timeouts.idle, timeouts.connect, timeouts.handoff) == (1.0, 2.0, 3.0, 10.0)


def test_a_list_is_replaced_and_not_added_to(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("decode: [a:1, b:1]\nprefill: [c:1]\n")
    monkeypatch.setenv("PD_PROXY_DECODE", "d:1")
    settings = configure({}, file, os.environ)
    assert (settings.decode, settings.prefill) == (("http://d:1",), ("http://c:1",))


def test_the_environment_may_name_the_file_and_a_flag_another(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "named.yaml"
    named.write_text("port: 1")
    monkeypatch.setenv("PD_PROXY_CONFIG", str(named))
    assert configure({}, None, os.environ).port == 1
    assert configure({}, write("port: 2"), os.environ).port == 2


def test_without_anything_the_defaults_hold() -> None:
    assert configure({}, None, {}).port == 8000


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_file_sets_nothing(write: Write, text: str) -> None:
    assert configure({}, write(text), {}).port == 8000


def test_a_group_may_be_one_json_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PD_PROXY_TIMEOUTS", '{"idle": 5}')
    assert configure({}, None, os.environ).timeouts.idle == 5.0


# Files that cannot be read


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    assert wrong({}, tmp_path / "none.yaml") == ["none.yaml: No such file or directory"]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert wrong({}, tmp_path / ".." / tmp_path.name) == [f"{tmp_path.name}: Is a directory"]


def test_bytes_are_no_file(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_bytes(b"host: \xff\xfe")
    assert wrong({}, path) == ["gateway.yaml: it is not UTF-8 text"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("port: [1", "gateway.yaml:1:9: not YAML: "),
        ("port: 1\n\tx: 2", "gateway.yaml:2:1: not YAML: "),
        ("a: b: c", "gateway.yaml:1:5: not YAML: "),
        ("x: !!python/object/apply:os.system ['true']", "gateway.yaml:1:4: not YAML: "),
        ("? [a]\n: 1", "gateway.yaml:1:3: not YAML: "),
    ],
)
def test_what_is_not_yaml_is_said_with_line_and_column(write: Write, text: str, line: str) -> None:
    (said,) = wrong({}, write(text))
    assert said.startswith(line)


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "7"])
def test_a_file_that_is_no_mapping_is_refused(write: Write, text: str) -> None:
    assert wrong({}, write(text)) == ["gateway.yaml:1: a settings file is a mapping of names to values"]


# What is wrong, and where


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("host: a\ntimeout:\n  idle: 1", "gateway.yaml:2: timeout: no such setting (did you mean timeouts?)"),
        (
            "timeouts:\n  idle: 1\n  prefil: 2",
            "gateway.yaml:3: timeouts.prefil: no such setting (did you mean timeouts.prefill?)",
        ),
        ("xyzzy: 1", "gateway.yaml:1: xyzzy: no such setting"),
        ("\nport: many", "gateway.yaml:2: port: input should be a valid integer, "),
        ("timeouts:\n  idle: -1", "gateway.yaml:2: timeouts.idle: input should be greater than 0, not -1"),
        ("decode:\n  - a:1\n  - ftp://b", "gateway.yaml:3: decode: 'ftp://b': a backend is http://host:port"),
        ("decode: [a:1, 'ftp://b']", "gateway.yaml:1: decode: 'ftp://b': a backend is http://host:port"),
        ("log_level: loud", "gateway.yaml:1: log_level: input should be 'debug', 'info', 'warning' or 'error', not"),
        ("metrics: 9090", "gateway.yaml:1: metrics: "),
        (
            "admission:\n  queue: -1",
            "gateway.yaml:2: admission.queue: input should be greater than or equal to 0, not -1",
        ),
        (
            "clients:\n  - name: a\n    key: k\n    wieght: 2",
            "gateway.yaml:4: clients.wieght: no such setting (did you mean clients.weight?)",
        ),
        (
            "clients:\n  - {name: a, key: k}\n  - name: b\n    key: l\n    weight: 0",
            "gateway.yaml:5: clients.weight: input should be greater than or equal to 0.01, not 0",
        ),
        ("clients:\n  - key: k", "gateway.yaml:2: clients.name: field required"),
        ("clients:\n  - {name: a b, key: k}", "gateway.yaml:2: clients.name: string should match pattern"),
        ("clients: [{name: a, key: k}, {name: a, key: l}]", "gateway.yaml: clients: two of them are named a"),
        ("clients: [{name: a, key: k}, {name: b, key: k}]", "gateway.yaml: clients: a and b have the same key"),
        ("api_keys: [j, k]\nclients: [{name: b, key: k}]", "gateway.yaml: clients: key-2 and b have the same key"),
        ("decode: [a:1]\nmixed: [a:1]", "gateway.yaml: http://a:1 is listed under decode and under mixed"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_line(write: Write, text: str, said: str) -> None:
    (line,) = wrong({}, write(text))
    assert line.startswith(said)


def test_everything_that_is_wrong_is_said_at_once(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PD_PROXY_PROT", "1")
    monkeypatch.setenv("PD_PROXY_LIMITS__ANSWER", "few")
    lines = wrong({"retries": {"attempts": "0"}}, write("hots: a\ntimeouts:\n  idle: 0\n"))
    assert sorted(line.partition(": ")[0] for line in lines) == [
        "PD_PROXY_LIMITS__ANSWER",
        "PD_PROXY_PROT",
        "flag --retries.attempts",
        "gateway.yaml:1",
        "gateway.yaml:3",
    ]


def test_an_unknown_variable_is_said_with_what_it_may_have_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PD_PROXY_TIMEOUT__PREFILL", "1")
    monkeypatch.setenv("PD_PROXY_HOTS", "1")
    assert wrong({}) == [
        "PD_PROXY_HOTS: no such setting (did you mean PD_PROXY_HOST?)",
        "PD_PROXY_TIMEOUT__PREFILL: no such setting (did you mean PD_PROXY_TIMEOUTS__PREFILL?)",
    ]


def test_clients_may_be_json_in_a_variable_and_in_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PD_PROXY_CLIENTS", '[{"name": "a", "key": "k", "weight": 2}]')
    [client] = configure({}, None, os.environ).clients
    assert (client.name, client.key.get_secret_value(), client.weight, client.requests) == ("a", "k", 2.0, None)
    [client] = configure({"clients": '[{"name": "b", "key": "k", "requests": 3}]'}, None, os.environ).clients
    assert (client.name, client.requests) == ("b", 3)
    monkeypatch.setenv("PD_PROXY_CLIENTS", '[{"name": "a", "kay": "424242"}]')
    assert sorted(wrong({})) == [
        "PD_PROXY_CLIENTS: clients.kay: no such setting (did you mean clients.key?)",
        "PD_PROXY_CLIENTS: clients.key: field required",
    ]
    monkeypatch.setenv("PD_PROXY_CLIENTS", '[{"name": 424242')
    assert wrong({}) == [
        'PD_PROXY_CLIENTS: clients: as a variable or a flag this is a JSON list: [{"name": "…", "key": "…"}]'
    ]
    assert wrong({"clients": "[1"})[0].startswith("flag --clients: clients: ")


def test_a_variable_that_is_like_no_setting_gets_no_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PD_PROXY_XYZZY", "1")
    assert wrong({}) == ["PD_PROXY_XYZZY: no such setting"]


def test_a_wrong_flag_is_said_by_its_name() -> None:
    assert wrong({"port": "99999"}) == ["flag --port: port: input should be less than or equal to 65535, not '99999'"]
    (line,) = wrong({"prot": "1"})
    assert line == "flag --prot: prot: no such setting (did you mean port?)"


def test_a_wrong_variable_is_said_by_its_name_though_the_file_has_the_setting_too(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PD_PROXY_TIMEOUTS__IDLE", "-1")
    (line,) = wrong({}, write("timeouts:\n  idle: 5\n"))
    assert line.startswith("PD_PROXY_TIMEOUTS__IDLE: timeouts.idle: ")


def test_a_variable_that_is_no_json_where_that_is_wanted_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PD_PROXY_POLICY", "{bad")
    (line,) = wrong({})
    assert "policy" in line


@pytest.mark.parametrize(
    "text",
    [
        "clients: [424242]",
        "clients: '424242'",
        "clients: [{name: a, key: 424242}]",
        "clients: [{key: '424242'}]",
        "clients: [{name: a, key: '424242'}, {name: b, key: '424242'}]",
        "admin_key: 424242",
        "api_keys: [424242]",
        "backend_api_key: [424242]",
        "decode: ['http://me:424242@a:1']",
    ],
)
def test_what_is_wrong_with_a_secret_is_said_without_it(write: Write, text: str) -> None:
    assert "424242" not in "\n".join(wrong({}, write(text)))
