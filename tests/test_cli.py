"""The command line, up to the point where a server would run."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml
from pd_proxy import __version__
from pd_proxy.process import ListenError
from pd_proxy.settings import flags
from pd_proxy.settings.tree import Settings, leaves

from tests.support import run_command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that a server was started with, instead of a server."""
    started: list[Settings] = []

    def serve(settings: Settings) -> int:
        started.append(settings)
        return 0

    monkeypatch.setattr("pd_proxy.process.serve", serve)
    monkeypatch.setattr("pd_proxy.telemetry.logs.set_up_logging", lambda level, shape: None)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return started


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], served: list[Settings]) -> Run:
    return partial(run_command, capsys)


# check


def test_check_of_a_good_file_prints_a_summary(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    file.write_text("prefill: [a:1, b:1]\ndecode: [c:1]\nport: 9000\nconnector: mooncake_ascend\n")
    assert run("check", file) == (
        0,
        f"{file}: good. 2 prefill, 1 decode, 0 mixed backend(s), connector mooncake_ascend, port 9000\n",
        "",
    )


def test_check_prints_a_summary_of_each_group(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    group = "{name: small, connector: auto, prefill: [p:1], decode: [d:1]}"
    file.write_text(f"prefill: [a:1]\ndecode: [c:1]\ngroups:\n  - {group}\n  - {{name: spare, mixed: [m:1]}}\n")
    lines = [
        "group default: 1 prefill, 1 decode, 0 mixed backend(s), connector nixl, port 8000",
        "group small: 1 prefill, 1 decode, 0 mixed backend(s), connector auto, port 8000",
        "group spare: 0 prefill, 0 decode, 1 mixed backend(s), connector nixl, port 8000",
    ]
    assert run("check", file) == (0, "".join(f"{file}: good. {line}\n" for line in lines), "")


def test_check_reports_the_line_of_a_wrong_group_or_alias(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(
        "groups:\n  - name: small\n    conector: nixl\n  - name: other\n    prefill: [a:b]\naliases:\n  a: 7\n"
    )
    status, _, err = run("check", file)
    assert status == 2
    assert sorted(err.splitlines()) == [
        f"pd-proxy: {file}:3: groups.conector: no such setting (did you mean groups.connector?)",
        f"pd-proxy: {file}:5: groups.prefill: a: the port must be a number from 1 to 65535",
        f"pd-proxy: {file}:7: aliases.a: must be text, not 7; put it in quotes",
    ]


def test_check_of_a_wrong_file_reports_the_line_and_exits_with_2(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("port: 9000\ntimeouts:\n  idel: 1\nlog_level: loud\n")
    status, out, err = run("check", file)
    assert (status, out) == (2, "")
    assert sorted(err.splitlines()) == [
        f"pd-proxy: {file}:3: timeouts.idel: no such setting (did you mean timeouts.idle?)",
        f"pd-proxy: {file}:4: log_level: must be debug, info, warning or error, not 'loud'",
    ]


def test_check_of_no_file_exits_with_2(run: Run, tmp_path: Path) -> None:
    status, out, err = run("check", tmp_path / "none.yaml")
    assert (status, out, err) == (2, "", f"pd-proxy: {tmp_path}/none.yaml: No such file or directory\n")
    assert run("check")[0] == 2


def test_the_example_file_is_good(run: Run) -> None:
    status, out, _ = run("check", Path(__file__).parents[1] / "config" / "pd-proxy.yaml")
    assert status == 0
    assert "2 prefill, 2 decode" in out


# serve


def test_serve_takes_every_kind_of_flag(run: Run, served: list[Settings]) -> None:
    line = (
        "serve --port 9000 --prefill a:1 --prefill b:1,c:1 --decode http://d:1 --timeouts.idle 7 "
        "--policy.decode random --api-keys one --api_keys two --access-log --log_level debug --metrics.port 9100 "
        "--retries.attempts=2"
    )
    assert run(*line.split()) == (0, "", "")
    (settings,) = served
    assert settings.port == 9000
    assert settings.prefill == ("http://a:1", "http://b:1", "http://c:1")
    assert settings.decode == ("http://d:1",)
    assert settings.timeouts.idle == 7.0
    assert settings.policy.decode == "random"
    assert [key.get_secret_value() for key in settings.api_keys] == ["one", "two"]
    assert settings.access_log is True
    assert settings.log_level == "debug"
    assert settings.metrics.port == 9100
    assert settings.retries.attempts == 2


def test_every_setting_is_a_flag_in_kebab_case(run: Run) -> None:
    words = set(re.findall(r"^  (--\S+)", run("serve", "--help", "all")[1], re.MULTILINE))
    assert words >= {f"--{name.replace('_', '-')}" for name, _ in leaves()}
    assert not [word for word in words if "_" in word]


@pytest.mark.parametrize("name", [name for name, _ in leaves() if "_" in name])
def test_a_flag_may_have_underscores_for_hyphens(name: str) -> None:
    given = [flags.in_kebab_case([f"--{written}=a_b", "c_d"]) for written in (name, name.replace("_", "-"))]
    assert given == [[f"--{name.replace('_', '-')}=a_b", "c_d"]] * 2


@pytest.mark.parametrize(
    ("flag", "value"), [("--access_log", True), ("--access_log=false", False), ("--access-log=true", True)]
)
def test_a_switch_may_be_given_alone_or_with_a_value(run: Run, served: list[Settings], flag: str, value: bool) -> None:
    assert run("serve", flag)[0] == 0
    assert served[0].access_log is value


def test_flags_win_over_variables_and_variables_over_the_file(
    run: Run, served: list[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("port: 1\nhost: file\nlog_level: error\n")
    monkeypatch.setenv("PD_PROXY_PORT", "2")
    monkeypatch.setenv("PD_PROXY_HOST", "variable")
    assert run("serve", "--config", file, "--port", "3")[0] == 0
    (settings,) = served
    assert (settings.port, settings.host, settings.log_level) == (3, "variable", "error")


def test_the_scripts_tutorial_line_works(run: Run, served: list[Settings]) -> None:
    line = (
        "serve --host 0.0.0.0 --port 12347 --prefiller-hosts 10.0.0.1 10.0.0.1 --prefiller-port 7100 7101 "
        "--decoder-hosts 10.0.0.2 --decoder-ports 7100 --workers 8 --log-level DEBUG"
    )
    status, out, err = run(*line.split())
    assert (status, out) == (0, "")
    assert err == ""
    (settings,) = served
    assert (settings.host, settings.port, settings.log_level, settings.workers) == ("0.0.0.0", 12347, "debug", 8)
    assert settings.prefill == ("http://10.0.0.1:7100", "http://10.0.0.1:7101")
    assert settings.decode == ("http://10.0.0.2:7100",)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--port many", "pd-proxy: flag --port: port: "),
        ("--decode ftp://x", "pd-proxy: flag --decode: decode: 'ftp://x': a backend is "),
        ("--timeouts.idle 0", "pd-proxy: flag --timeouts.idle: timeouts.idle: must be above 0, not '0'"),
        ("--prefiller-hosts a b --prefiller-ports 1", "pd-proxy: --prefiller-hosts names 2 host(s)"),
        ("--config /no/such/file", "pd-proxy: /no/such/file: No such file or directory"),
        ("--decode a:1 --mixed a:1", "pd-proxy: flag --mixed: http://a:1 is listed under decode and under mixed"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_status_2(run: Run, served: list[Settings], line: str, says: str) -> None:
    status, out, err = run("serve", *line.split())
    assert (status, out) == (2, "")
    (said,) = err.splitlines()
    assert said.startswith(says)
    assert served == []


@pytest.mark.parametrize("flag", ["--timeout.prefill", "--prefil", "--time"])
def test_an_unknown_or_abbreviated_flag_is_refused(run: Run, served: list[Settings], flag: str) -> None:
    status, out, err = run("serve", flag, "1")
    assert (status, out) == (2, "")
    assert f"unrecognized arguments: {flag}" in err
    assert served == []


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        ("serve --timeout.prefill 1", "--timeouts.prefill"),
        ("serve --log-levl=info", "--log-level"),
        ("serve --log_levl=info", "--log-level"),
        ("serve --grace 1", "--shutdown.grace"),
        ("serve --prefil a:1", "--prefill"),
        ("simulate --roll prefill", "--role"),
        ("serv --port 1", "serve"),
        ("chek file", "check"),
        ("--prefill a:1 --decode b:1", "pd-proxy serve --prefill"),
    ],
)
def test_an_unknown_name_is_reported_with_a_suggestion(run: Run, served: list[Settings], argv: str, meant: str) -> None:
    status, out, err = run(*argv.split())
    assert (status, out) == (2, "")
    assert f"(did you mean {meant}" in err
    assert served == []


def test_an_address_that_is_taken_exits_with_1(
    run: Run, served: list[Settings], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def serve(settings: Settings) -> int:
        raise ListenError("cannot listen on 127.0.0.1:8000: Address already in use")

    monkeypatch.setattr("pd_proxy.process.serve", serve)
    assert run("serve")[0] == 1
    assert caplog.records[-1].message == "cannot listen on 127.0.0.1:8000: Address already in use"
    assert caplog.records[-1].levelname == "ERROR"


# config


def test_config_shows_the_settings_in_force_with_their_sources(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("port: 9000\nadmin_key: hush\n")
    status, out, err = run("config", "--config", file, "--log-level", "debug", "--changed")
    assert (status, err) == (0, "")
    assert [line.split("#")[1].strip() for line in out.splitlines()] == [f"{file}:1", f"{file}:2", "flag --log-level"]
    assert "hush" not in out
    assert len(yaml.safe_load(run("config")[1])) == len(Settings.model_fields)
    assert json.loads(run("config", "--json", "--port", "7")[1])["port"] == {"value": 7, "origin": "flag --port"}


def test_the_default_file_that_config_prints_is_good(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "pd-proxy.yaml"
    file.write_text(run("config", "--default")[1])
    status, out, err = run("check", "--strict", file)
    assert (status, err) == (0, "")
    assert out.startswith(f"{file}: good. ")


def test_config_of_wrong_settings_exits_with_2(run: Run) -> None:
    assert run("config", "--port", "many") == (
        2,
        "",
        "pd-proxy: flag --port: port: must be a whole number, not 'many'\n",
    )


def test_check_prints_warnings_and_with_strict_they_are_errors(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("host: 0.0.0.0\nmixed: [a:1]\n")
    for more, expected in (([], 0), (["--strict"], 1)):
        status, out, err = run("check", file, *more)
        assert status == expected
        assert out.startswith(f"{file}: 1 warning(s). 0 prefill, 0 decode, 1 mixed")
        assert err.startswith(f"pd-proxy: warning: {file}:1: host: clients need no key")


# Log lines at the start


def test_the_first_line_has_the_version_and_the_settings_that_are_not_defaults(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PD_PROXY_ADMIN_KEY", "hush")
    with caplog.at_level(logging.INFO, "pd_proxy"):
        run("serve", "--mixed", "a:1,b:1", "--timeouts.idle", "7", "--api-keys", "env:PD_PROXY_ADMIN_KEY")
    first = caplog.records[0].message
    begin = f"pd-proxy {__version__} starts; settings that are not defaults: "
    assert first.startswith(begin)
    assert sorted(first.removeprefix(begin).split(", ")) == [
        *("admin_key=********", "api_keys=********", "mixed=http://a:1,http://b:1", "timeouts.idle=7.0")
    ]
    assert "hush" not in caplog.text


@pytest.mark.parametrize(
    ("flags_", "warned"),
    [
        ("--admin-key hush", ["--admin-key"]),
        (
            "--api-keys hush --backend-api-key hush --handoff-key hush",
            ["--api-keys", "--backend-api-key", "--handoff-key"],
        ),
        ("--api_keys env:A,hush", ["--api-keys"]),
        ('--clients [{"name":"a","key":"hush"}]', ["--clients"]),
        ("--admin-key env:A --api-keys env:B --backend-api-key env:B", []),
        ('--clients [{"name":"a","key":"env:A"}]', []),
    ],
)
def test_a_secret_given_as_a_flag_gets_a_warning_without_the_secret(
    run: Run,
    served: list[Settings],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    flags_: str,
    warned: list[str],
) -> None:
    monkeypatch.setenv("A", "one")
    monkeypatch.setenv("B", "two")
    with caplog.at_level(logging.INFO, "pd_proxy"):
        assert run("serve", "--mixed", "m:1", *flags_.split(" "))[0] == 0
    told = [record.message for record in caplog.records if "list of processes" in record.message]
    assert [message.partition(":")[0] for message in told] == warned
    assert "hush" not in caplog.text
    assert len(served) == 1


def test_variables_of_kubernetes_are_one_line_at_the_start(
    run: Run, served: list[Settings], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PD_PROXY_SERVICE_HOST", "10.96.0.7")
    monkeypatch.setenv("PD_PROXY_PORT", "tcp://10.96.0.7:80")
    with caplog.at_level(logging.INFO, "pd_proxy"):
        assert run("serve", "--mixed", "a:1")[0] == 0
    (line,) = [record for record in caplog.records if "Kubernetes" in record.message]
    assert line.levelname == "INFO"
    assert "PD_PROXY_PORT, PD_PROXY_SERVICE_HOST" in line.message
    assert served[0].port == 8000


# Help


HELP = [[], ["serve"], ["check"], ["config"], ["simulate"]]


@pytest.mark.parametrize("command", [*HELP, ["serve", "all"], *(["serve", s.title] for s in flags.sections())])
def test_help_fits_a_terminal(run: Run, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    status, out, err = run(*command[:1], "--help", *command[1:])
    assert (status, err) == (0, "")
    assert out.startswith("usage: pd-proxy")
    assert max(map(len, out.splitlines())) <= 100
    assert "PydanticUndefined" not in out
    assert "None)" not in out
    assert "**" not in out


def test_help_begins_with_the_common_settings_and_fits_a_screen(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    out = run("serve", "--help")[1]
    assert len(out.splitlines()) <= 50
    shown = re.findall(r"^  --(\S+)", out, re.MULTILINE)
    assert shown == ["config", *(name.replace("_", "-") for name in flags.COMMON)]
    assert "--help SECTION" in out or "--help: all" in out


def test_help_of_a_section_shows_that_section_alone(run: Run) -> None:
    out = run("serve", "--help", "timeouts")[1]
    shown = set(re.findall(r"^  --(\S+)", out, re.MULTILINE))
    assert shown == {"config"} | {name.replace("_", "-") for name, _ in leaves() if name.startswith("timeouts.")}
    status, _, err = run("serve", "--help", "timeout")
    assert status == 2
    assert "no section 'timeout'" in err


def test_each_setting_is_in_one_section() -> None:
    listed = [name for section in flags.sections() for name, _ in section.settings]
    assert sorted(listed) == sorted(name for name, _ in leaves())


def test_help_has_the_description_and_the_default_of_each_setting(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    text = " ".join(run("serve", "--help", "all")[1].split())
    for _, field in leaves():
        assert " ".join(str(field.description).split()) in text
    assert "(default 8000)" in text
    assert "auto|least_loaded|prefix|session|round_robin|random|power_of_two" in text


def test_the_version_is_printed(run: Run) -> None:
    assert run("--version") == (0, f"pd-proxy {__version__}\n", "")


@pytest.mark.parametrize("argv", [[], ["serf"]])
def test_a_missing_or_wrong_command_is_refused(run: Run, argv: list[str]) -> None:
    status, _, err = run(*argv)
    assert status == 2
    assert "serve | check | config | doctor" in err


def test_a_gateway_does_not_import_the_simulator(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("port: 1\n")
    said = (
        "import sys; from pd_proxy.cli import main; main(sys.argv[1:]); "
        "print([name for name in sys.modules if name.startswith('pd_proxy_simulator')])"
    )
    command = [sys.executable, "-c", said, "check", str(tmp_path / "c.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
