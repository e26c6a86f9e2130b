"""The flags of the example script (vllm-ascend's load_balance_proxy_server_example.py), as its users type them."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from pd_proxy.settings import drop_in
from pd_proxy.settings.load import configure
from pd_proxy.settings.problems import ConfigurationError


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def translated(line: str, **flags: Any) -> tuple[dict[str, Any], list[str]]:
    """The settings and notices that a command line of the script becomes."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    drop_in.add_arguments(parser)
    notices = drop_in.translate(parser.parse_args(line.split()), flags)
    return flags, notices


def pools(line: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    settings = configure(translated(line)[0], None, {})
    return settings.prefill, settings.decode


@pytest.mark.parametrize(
    ("line", "prefill", "decode"),
    [
        (
            "--prefiller-hosts p1 p2 --prefiller-ports 1 2 --decoder-hosts d1 --decoder-ports 3",
            ("http://p1:1", "http://p2:2"),
            ("http://d1:3",),
        ),
        ("--prefiller-port 8100 --decoder-port 8200", ("http://localhost:8100",), ("http://localhost:8200",)),
        ("--prefiller-host p --decoder-host d", ("http://p:8001",), ("http://d:8002",)),
        ("--decoder-hosts d", ("http://localhost:8001",), ("http://d:8002",)),
        (
            "--prefiller-hosts p p p --prefiller-ports 1 2 3 --decoder-ports 9",
            ("http://p:1", "http://p:2", "http://p:3"),
            ("http://localhost:9",),
        ),
        ("--prefiller-hosts p p --prefiller-ports 1 1", ("http://p:1",), ("http://localhost:8002",)),
        ("--prefiller-hosts fe80::1 --prefiller-ports 1", ("http://[fe80::1]:1",), ("http://localhost:8002",)),
    ],
)
def test_hosts_and_ports_become_pools_as_the_script_makes_them(
    line: str, prefill: tuple[str, ...], decode: tuple[str, ...]
) -> None:
    assert pools(line) == (prefill, decode)


def test_without_the_scripts_flags_nothing_is_set() -> None:
    assert translated("") == ({}, [])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "--prefiller-hosts p --prefiller-ports 1 2",
            "--prefiller-hosts names 1 host(s) and --prefiller-ports 2 port(s)",
        ),
        ("--decoder-hosts a b c --decoder-ports 1", "--decoder-hosts names 3 host(s) and --decoder-ports 1 port(s)"),
        ("--decoder-ports 1 2", "--decoder-hosts names 1 host(s) and --decoder-ports 2 port(s)"),
        ("--decoder-hosts a b", "--decoder-hosts names 2 host(s) and --decoder-ports 1 port(s)"),
    ],
)
def test_lists_of_unequal_length_are_refused_and_the_remedy_is_named(line: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        translated(line)
    assert says in str(caught.value)
    assert "repeat a host for each of its ports" in str(caught.value)


def test_the_scripts_flags_add_to_the_gateways_own() -> None:
    flags, _ = translated("--prefiller-ports 1", prefill="http://x:9")
    assert flags["prefill"] == "http://x:9,http://localhost:1"


def test_a_backend_in_both_lists_is_refused_as_anywhere() -> None:
    with pytest.raises(ConfigurationError, match="under prefill and under decode"):
        pools("--prefiller-ports 1 --decoder-ports 1")


def test_the_scripts_key_goes_to_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    assert translated("--prefiller-ports 1")[0]["backend_api_key"] == "key"
    assert translated("--prefiller-ports 1", backend_api_key="own")[0]["backend_api_key"] == "own"
    assert "backend_api_key" not in translated("")[0]


@pytest.mark.parametrize(("given_", "attempts"), [(3, 3), (1, 1), (0, 1), (-1, 1)])
def test_max_retries_counts_tries_as_in_the_script(given_: int, attempts: int) -> None:
    flags, notices = translated(f"--max-retries {given_}")
    assert flags == {"retries": {"attempts": attempts}}
    assert notices == []


def test_the_gateways_own_flags_win() -> None:
    flags, _ = translated(
        "--max-retries 9 --waiting-retry-interval 9", retries={"attempts": "2"}, health={"longest_wait": "3"}
    )
    assert flags == {"retries": {"attempts": "2"}, "health": {"longest_wait": "3"}}


def test_the_waiting_interval_is_the_longest_wait() -> None:
    assert translated("--waiting-retry-interval 10")[0] == {"health": {"longest_wait": 10.0}}


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("--retry-delay 0.001", "--retry-delay"),
        ("--max-waiting-retries 3", "--max-waiting-retries"),
    ],
)
def test_a_flag_without_effect_gets_a_notice(line: str, flag: str) -> None:
    flags, notices = translated(line)
    assert flags == {}
    (notice,) = notices
    assert notice.startswith(f"{flag} has no effect: ")


@pytest.mark.parametrize(
    ("given_", "level"), [("INFO", "info"), ("DEBUG", "debug"), ("CRITICAL", "error"), ("error", "error")]
)
def test_log_levels_may_be_the_scripts(given_: str, level: str) -> None:
    flags, _ = translated("", log_level=given_)
    assert configure(flags, None, {}).log_level == level


@pytest.mark.parametrize("line", ["--prefiller-ports one", "--max-retries few"])
def test_values_that_are_no_numbers_are_refused(line: str) -> None:
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        translated(line)
