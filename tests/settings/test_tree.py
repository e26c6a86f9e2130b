"""The tree of settings: its values, and what it refuses."""

from __future__ import annotations

import re
from math import inf
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.admission.clients import clients
from pd_proxy.settings.addresses import backend_url
from pd_proxy.settings.tree import Settings, build_settings, leaves
from pydantic import ValidationError

PORTS = st.integers(1, 65535)
HOSTS = st.from_regex(r"[a-z][a-z0-9-]{0,10}(\.[a-z][a-z0-9]{0,5}){0,2}", fullmatch=True) | st.just("[::1]")


@pytest.mark.parametrize(
    ("given_", "kept"),
    [
        ("http://host:8000", "http://host:8000"),
        ("host:8000", "http://host:8000"),
        ("host", "http://host"),
        ("1.2.3.4:80", "http://1.2.3.4:80"),
        ("  http://host:80/ ", "http://host:80"),
        ("HTTP://Host:80", "http://host:80"),
        ("https://host", "https://host"),
        ("http://host:80/v1", "http://host:80"),
        ("http://host:80/v1/", "http://host:80"),
        ("http://host:80/engines/A/v1", "http://host:80/engines/A"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_a_backends_url_has_one_form(given_: str, kept: str) -> None:
    assert backend_url(given_) == kept


@given(HOSTS, PORTS, st.sampled_from(["", "/", "/v1", "/a/b", "/v1/"]))
def test_a_backends_url_in_its_one_form_stays_unchanged(host: str, port: int, path: str) -> None:
    once = backend_url(f"{host}:{port}{path}")
    assert once.startswith(f"http://{host}:{port}")
    assert backend_url(once) == once


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://host", "a backend is http://host:port or https://host:port"),
        ("", "names no host"),
        ("http://:80", "names no host"),
        ("http://host:99999", "the port must be a number"),
        ("http://host:port", "the port must be a number"),
        ("http://[::1", "Invalid IPv6 URL"),
        ("http://host/?x=1", "no query"),
        ("http://host#x", "no fragment"),
        ("http://me:secret@host", "credentials do not belong"),
        ("http://:secret@host", "credentials do not belong"),
        ("http:/me:secret@host:1", "two slashes"),
        ("http:/a:1", "two slashes"),
        ("HTTP:/a:1", "two slashes"),
        ("https:/a", "two slashes"),
        ("http:a:1", "two slashes"),
        ("http//a:1", "two slashes"),
        ("ftp:/a:1", "two slashes"),
        ("://a:1", "backend is http://"),
        ("//a:1", "names no host"),
        ("http://a:", "a colon without a port"),
        ("http://a:1:2", "the port must be a number"),
        ("http://10.0.0.256:1", "not an IP address"),
        ("http://10.0.0:1", "not an IP address"),
        ("http://[::zz]:1", "IP"),
        ("http://a..b:1", "not a host name"),
        ("http://-a:1", "not a host name"),
        ("http://*:1", "not a host name"),
        ("http://$(HOST):1", "not a host name"),
        ("http://{{ host }}:1", "without spaces"),
        ("http://<decode>:1", "not a host name"),
        ("http://a:1/v1/chat/completions", "one of an engine's routes"),
        ("http://a:1/health", "one of an engine's routes"),
        ("http://a:1//v1", "an empty segment"),
        ("unix:/run/engine.sock", "two slashes"),
    ],
)
def test_an_invalid_backend_url_is_refused(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)) as caught:
        backend_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://", "http://a b:80", "http://host:0", "http://bücher:80", "http://host/a b"])
def test_a_url_that_no_request_could_be_sent_to_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"host|port|URL|path"):
        backend_url(url)


@pytest.mark.parametrize(
    ("pools", "where"),
    [
        ({"prefill": ["http://a:1"], "decode": ["http://a:1"]}, "under prefill and under decode"),
        ({"decode": ["a:1"], "mixed": ["http://A:1/v1/"]}, "under decode and under mixed"),
        ({"prefill": ["http://a:1", "a:1"]}, "twice under prefill"),
        (
            {"prefill": ["a:1"], "groups": [{"name": "g", "decode": ["A:1"]}]},
            "under prefill and under decode of group g",
        ),
    ],
)
def test_a_backend_has_one_role(pools: dict[str, list[str]], where: str) -> None:
    with pytest.raises(ValidationError, match=rf"http://a:1 is listed {where}"):
        Settings(**pools)  # type: ignore[arg-type]


@pytest.mark.parametrize(("one", "other"), [("http://a", "a:80"), ("https://a", "https://a:443"), ("a/x", "a:80/x/")])
def test_a_backend_is_the_same_with_and_without_its_schemes_default_port(one: str, other: str) -> None:
    with pytest.raises(ValidationError, match="under prefill and under mixed"):
        build_settings({"prefill": [one], "mixed": [other]}, {})


def test_lists_may_be_one_string_with_commas() -> None:
    settings = build_settings({"decode": "a:1, http://b:2 ,,"}, {"prefill": ["c:3", "d:4"]})
    assert settings.decode == ("http://a:1", "http://b:2")
    assert settings.prefill == ("http://c:3", "http://d:4")


def test_lists_in_the_environment_are_comma_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PD_PROXY_DECODE", "http://a:1,b:2")
    monkeypatch.setenv("PD_PROXY_API_KEYS", "one, two")
    settings = build_settings({}, {})
    assert settings.decode == ("http://a:1", "http://b:2")
    assert [key.get_secret_value() for key in settings.api_keys] == ["one", "two"]


def test_secrets_are_not_shown() -> None:
    settings = build_settings(
        {
            "api_keys": ["hush"],
            "admin_key": "hush",
            "backend_api_key": "hush",
            "clients": [{"name": "a", "key": "hush too"}],
        },
        {},
    )
    for shown in (repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert "hush" not in shown
    assert settings.api_keys[0].get_secret_value() == "hush"


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({"timeouts": {"connect": 0}}, "timeouts.connect"),
        ({"timeouts": {"idle": -1}}, "timeouts.idle"),
        ({"timeouts": {"total": 0}}, "timeouts.total"),
        ({"limits": {"request_body": 10}}, "limits.request_body"),
        ({"health": {"failures": 0}}, "health.failures"),
        ({"retries": {"attempts": 0}}, "retries.attempts"),
        ({"retries": {"attempts": 21}}, "retries.attempts"),
        ({"shutdown": {"grace": -0.1}}, "shutdown.grace"),
        ({"port": 65536}, "port"),
        ({"admission": {"requests": 0}}, "admission.requests"),
        ({"admission": {"queue_timeout": 0}}, "admission.queue_timeout"),
        ({"clients": [{"name": "a", "key": "k", "priority": 101}]}, "clients.0.priority"),
        ({"clients": [{"name": "a", "key": ""}]}, "clients.0.key"),
        ({"metrics": {"port": -1}}, "metrics.port"),
        ({"connector": "p2p"}, "connector"),
        ({"fallback": "maybe"}, "fallback"),
        ({"policy": {"decode": "best"}}, "policy.decode"),
        ({"log_level": "loud"}, "log_level"),
        ({"unknown": 1}, "unknown"),
        ({"timeouts": {"unknown": 1}}, "timeouts.unknown"),
    ],
)
def test_a_value_out_of_bounds_and_an_unknown_name_are_refused(flags: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        build_settings(flags, {})
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [field]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"targets": {"ttft": 601}, "timeouts": {"prefill": 600}}, "targets.ttft: timeouts.prefill ends a request"),
        ({"targets": {"tpot": 61}, "timeouts": {"idle": 60}}, "targets.tpot: timeouts.idle ends a request after 60 s"),
        ({"targets": {"ttft": 31}, "timeouts": {"total": 30}}, "targets.ttft: timeouts.total ends a request"),
        (
            {"clients": [{"name": "a", "key": "k", "ttft": 31}], "timeouts": {"total": 30}},
            "clients.0.ttft: timeouts.total ends a request",
        ),
        ({"admission": {"slo": "refuse"}}, "admission.slo: refuse needs targets.ttft, or a client's own"),
    ],
)
def test_impossible_targets_are_refused(flags: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(says)):
        build_settings(flags, {})


def test_one_clients_target_is_enough_for_slo_and_the_others_have_none() -> None:
    both = [{"name": "a", "key": "k", "ttft": 2}, {"name": "b", "key": "l"}]
    settings = build_settings({"admission": {"slo": "refuse"}, "clients": both, "targets": {"tpot": 0.05}}, {})
    assert [client.target for client in clients(settings).values()] == [2, inf]


def test_clients_of_api_keys_are_named_by_position_and_not_by_the_secret() -> None:
    settings = build_settings({"api_keys": "one,two", "clients": [{"name": "c", "key": "three"}]}, {})
    named = {name: key.get_secret_value() for name, key in settings.client_keys()}
    assert named == {"key-1": "one", "key-2": "two", "c": "three"}


def test_settings_are_immutable() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.port = 1
    with pytest.raises(ValidationError):
        settings.timeouts.idle = 1


def test_every_setting_has_a_description_and_is_found_by_its_dotted_name() -> None:
    found = dict(leaves())
    assert len(found) == len(leaves())
    assert {"port", "timeouts.prefill", "policy.decode", "metrics.port", "api_keys"} <= found.keys()
    assert "timeouts" not in found
    for name, field in found.items():
        assert field.description, name


def test_the_example_file_has_every_setting_with_its_default() -> None:
    file = Path(__file__).parents[2] / "config" / "pd-proxy.yaml"
    tree = yaml.safe_load(file.read_text())
    settings = build_settings({}, tree)
    for name, field in leaves():
        value, given_ = settings, tree
        for part in name.split("."):
            assert part in given_, f"{file.name} lacks {name}"
            value, given_ = getattr(value, part), given_[part]
        if name not in ("prefill", "decode"):
            assert value == field.default, name


def test_aliases_are_a_mapping_in_the_file_and_pairs_as_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"gpt-4": "org/model:v1", "o3": "small"}
    assert build_settings({}, {"aliases": expected}).aliases == expected
    monkeypatch.setenv("PD_PROXY_ALIASES", "gpt-4=org/model:v1, o3 = small")
    assert build_settings({}, {}).aliases == expected
    assert build_settings({"aliases": "a=b"}, {}).aliases == {"a": "b"}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"aliases": "gpt-4"}, "name=model"),
        ({"aliases": {"a": ""}}, "at least 1 character"),
        ({"aliases": {"a": "b", "b": "c"}}, "a stands for b, which is an alias too"),
        ({"unknown_model": "default"}, "needs a default_model"),
        ({"pair_revisions": "never"}, "'strict' or 'any'"),
    ],
)
def test_aliases_that_lead_nowhere_are_refused(values: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(says)):
        build_settings(values, {})


def test_engines_that_call_back_need_the_gateways_address() -> None:
    with pytest.raises(ValidationError, match=r"metaserver\.url: decode engines that speak ascend_layerwise call"):
        build_settings({"connector": "ascend_layerwise"}, {})
    group = {"name": "npu", "connector": "ascend_layerwise"}
    with pytest.raises(ValidationError, match=r"metaserver\.url"):
        build_settings({"groups": [group]}, {})
    told = build_settings({"groups": [group], "metaserver": {"url": "10.0.0.1:8000/", "allow": "10.0.0.0/8, ::1"}}, {})
    assert told.metaserver.url == "http://10.0.0.1:8000"
    assert [str(network) for network in told.metaserver.allow] == ["10.0.0.0/8", "::1/128"]


@pytest.mark.parametrize("url", ["http://0.0.0.0:8000", "[::]:8000", "ftp://here", "http://user:pw@here", "http://"])
def test_an_invalid_callback_address_is_refused(url: str) -> None:
    with pytest.raises(ValidationError):
        build_settings({"metaserver": {"url": url}}, {})


def test_networks_must_be_valid() -> None:
    with pytest.raises(ValidationError, match=r"10\.0\.0\.1/8"):
        build_settings({"metaserver": {"allow": ["10.0.0.1/8"]}}, {})


def test_an_encoder_has_no_other_role() -> None:
    with pytest.raises(ValidationError, match="listed under prefill and under encode"):
        build_settings({"prefill": ["a:1"], "encode": ["a:1"]}, {})
    group = {"name": "far", "mixed": ["b:1"], "encode": ["a:1"]}
    with pytest.raises(ValidationError, match="listed under encode and under encode of group far"):
        build_settings({"encode": ["a:1"], "groups": [group]}, {})
    assert build_settings({"groups": [group]}, {}).all_groups()[1].encode == ("http://a:1",)


# Engines that send the gateway messages

LMCACHE: dict[str, Any] = {
    "connector": "lmcache_pd",
    "prefill": ["10.0.0.1:8000"],
    "decode": ["10.0.0.2:8000"],
    "locations": [{"backend": "10.0.0.2:8000", "init_ports": [7300], "alloc_ports": [7400]}],
    "zmq": {"notices": "10.0.0.9:7500"},
}


def test_lmcache_needs_the_address_for_notifications_and_decodes_ports() -> None:
    assert build_settings(LMCACHE, {}).zmq.notices == "10.0.0.9:7500"
    assert build_settings({"connector": "lmcache_pd"}, {}).zmq.notices == "", (
        "without backends there is nothing to hear"
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"zmq": {}}, "zmq.notices must be set"),
        ({"reuse_port": True}, "not with reuse_port"),
        ({"workers": 2}, "not with several workers"),
        ({"locations": []}, "10.0.0.2:8000 needs init_ports"),
        ({"locations": [{"backend": "10.0.0.2:8000", "init_ports": [1]}]}, "as many alloc_ports"),
        ({"locations": [{"backend": "10.0.0.2:8000", "alloc_ports": [1]}]}, "needs init_ports"),
        (
            {"locations": [{"backend": "10.0.0.2:8000", "init_ports": [1], "alloc_ports": [2], "query_ports": [3, 4]}]},
            "query_ports",
        ),
    ],
)
def test_missing_settings_of_lmcache_are_reported_at_the_start(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        build_settings({**LMCACHE, **changed}, {})


@pytest.mark.parametrize("text", ["10.0.0.9:7500", "tcp://10.0.0.9:7500", " 0.0.0.0:1 ", "[::1]:7500"])
def test_the_address_for_engines_messages_is_an_ip_address_and_a_port(text: str) -> None:
    address = build_settings({"zmq": {"notices": text}}, {}).zmq.notices
    assert address == text.strip().removeprefix("tcp://")


@pytest.mark.parametrize(
    "text",
    ["7500", ":7500", "gateway:7500", "*:7500", "10.0.0.9", "10.0.0.9:0", "10.0.0.9:99999", "10.0.0.9:1/x", "a b"],
)
def test_any_other_address_for_engines_messages_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="IP address"):
        build_settings({"zmq": {"notices": text}}, {})


MORIIO: dict[str, Any] = {
    "connector": "moriio_read",
    "prefill": ["10.0.0.1:8000"],
    "decode": ["10.0.0.2:8000"],
    "zmq": {"registrations": "10.0.0.9:36367"},
}


def test_networks_from_which_engines_join_are_a_list() -> None:
    settings = build_settings(
        {"connector": "p2p_nccl", "zmq": {**MORIIO["zmq"], "networks": "10.0.0.0/8,fd00::/8"}}, {}
    )
    assert [str(network) for network in settings.zmq.networks] == ["10.0.0.0/8", "fd00::/8"]
    assert build_settings(MORIIO, {}).zmq.networks == ()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"zmq": {}}, "zmq.registrations must be set"),
        ({"reuse_port": True}, "not with reuse_port"),
        ({"workers": 2}, "not with several workers"),
        ({"zmq": {**MORIIO["zmq"], "group": "other"}}, "there is no group other"),
        ({"zmq": {**MORIIO["zmq"], "networks": ["10.0.0.1/8"]}}, "host bits"),
        ({"zmq": {**MORIIO["zmq"], "networks": ["everywhere"]}}, "networks"),
        ({"zmq": {"networks": ["10.0.0.0/8"]}, "prefill": [], "decode": []}, "zmq.registrations must be set"),
        ({"zmq": {**MORIIO["zmq"], "networks": ["10.0.0.0/8"]}, "connector": "nixl"}, "nixl .*do not register"),
    ],
)
def test_missing_settings_of_registering_engines_are_reported_at_the_start(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        build_settings({**MORIIO, **changed}, {})


def test_the_header_that_names_a_session_may_be_written_in_any_case() -> None:
    assert build_settings({"policy": {"session_header": "X-Session_Id"}}, {}).policy.session_header == "x-session_id"
    with pytest.raises(ValidationError, match="session_header"):
        build_settings({"policy": {"session_header": "x session"}}, {})
