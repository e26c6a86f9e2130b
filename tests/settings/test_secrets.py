"""Secrets in settings: which are refused, and where they may stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from pd_proxy.settings.load import configure
from pd_proxy.settings.problems import ConfigurationError

from tests.settings.helpers import Write, wrong


@pytest.mark.parametrize(
    "text",
    [
        'api_keys: [""]',
        'api_keys: ["  "]',
        'api_keys: ""',
        "api_keys: [good, '']",
        "api_keys: ','",
        'admin_key: ""',
        'admin_key: "\\t"',
        'backend_api_key: ""',
        'handoff_key: " "',
        'clients: [{name: a, key: ""}]',
        'clients: [{name: a, key: " "}]',
    ],
)
def test_an_empty_secret_is_an_error_wherever_it_stands(write: Write, text: str) -> None:
    (line,) = wrong({}, write(text))
    assert line.startswith("gateway.yaml:1: ")
    assert "a secret must not be empty" in line


@pytest.mark.parametrize(
    "name", ["PD_PROXY_API_KEYS", "PD_PROXY_ADMIN_KEY", "PD_PROXY_BACKEND_API_KEY", "PD_PROXY_HANDOFF_KEY"]
)
@pytest.mark.parametrize("value", ["", " ", "\t"])
def test_a_variable_for_keys_that_is_set_but_empty_is_an_error(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}: .*a secret must not be empty"):
        configure({}, None, {name: value})


@pytest.mark.parametrize("value", ["a,", ",a", "a,,b", "a, ,b"])
def test_a_key_that_is_missing_between_commas_is_an_error(value: str) -> None:
    with pytest.raises(ConfigurationError, match="PD_PROXY_API_KEYS: api_keys: a secret must not be empty"):
        configure({}, None, {"PD_PROXY_API_KEYS": value})
    with pytest.raises(ConfigurationError, match="flag --api-keys: api_keys: a secret must not be empty"):
        configure({"api_keys": value}, None, {})


def test_an_empty_list_of_keys_may_be_set() -> None:
    assert configure({}, None, {}).api_keys == ()


@pytest.mark.parametrize(
    "value", ["424242\nx", "42\u20ac42", "424242\x00", "${424242}", "$(MY_KEY)", "$MY_KEY", "<key>"]
)
def test_an_invalid_or_placeholder_secret_is_refused_without_being_shown(value: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        configure({"admin_key": value}, None, {})
    assert "42" not in str(caught.value)
    assert "MY_KEY" not in str(caught.value)


def test_a_secret_may_be_in_a_file_or_a_variable_of_its_own(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\n\n two \n")
    admin = tmp_path / "admin"
    admin.write_text("secret\n")
    environment = {"BACKEND": "engines", "PD_PROXY_CLIENTS": f'[{{"name": "a", "key": "file:{admin}"}}]'}
    flags = {"api_keys": f"file:{keys},env:BACKEND", "admin_key": f"file:{admin}", "backend_api_key": "env:BACKEND"}
    settings = configure(flags, None, environment)
    assert [key.get_secret_value() for key in settings.api_keys] == ["one", "two", "engines"]
    assert settings.admin_key is not None
    assert settings.admin_key.get_secret_value() == "secret"
    assert settings.backend_api_key is not None
    assert settings.backend_api_key.get_secret_value() == "engines"
    assert settings.clients[0].key.get_secret_value() == "secret"


@pytest.mark.parametrize("name", ["api_keys", "admin_key", "backend_api_key", "handoff_key"])
@pytest.mark.parametrize("reference", ["file:/no/such/file", "file:", "file:/", "env:NOT_SET", "env:", "env:BLANK"])
def test_a_reference_that_leads_nowhere_is_an_error(name: str, reference: str) -> None:
    with pytest.raises(ConfigurationError, match=f"flag --{name.replace('_', '-')}: {name}: "):
        configure({name: reference}, None, {"BLANK": " "})


def test_an_empty_file_of_keys_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n \n")
    for name in ("api_keys", "admin_key"):
        with pytest.raises(ConfigurationError, match="is empty or does not exist"):
            configure({name: f"file:{tmp_path}/keys"}, None, {})
