"""The settings in force, as they are printed."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from pd_proxy.settings import shown
from pd_proxy.settings.load import configure, gather
from pd_proxy.settings.tree import Settings, leaves

SECRETS = {
    "api_keys": "hush-1,hush-2",
    "admin_key": "hush-3",
    "backend_api_key": "hush-4",
    "handoff_key": "hush-5",
    "clients": '[{"name": "a", "key": "hush-6", "weight": 2}]',
}


def test_every_setting_is_shown_once_and_reads_as_the_same_settings(tmp_path: Path) -> None:
    first = gather({"port": "9", "prefill": "a:1,b:1", "aliases": "x=y", "resume": "off"}, None, {})
    text = shown.in_force(first.settings, first.origins)
    file = tmp_path / "again.yaml"
    file.write_text(text)
    assert configure({}, file, {}) == first.settings
    tree = yaml.safe_load(text)
    assert tree.keys() == set(Settings.model_fields)
    assert len([line for line in text.splitlines() if " # " in line]) == len(leaves())


def test_each_line_has_the_source_of_its_setting(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("port: 1\ntimeouts:\n  idle: 5\n")
    found = gather({"log_level": "debug"}, file, {"PD_PROXY_TIMEOUTS__CONNECT": "2"})
    lines = [line.split("#") for line in shown.in_force(found.settings, found.origins, changed=True).splitlines()]
    assert [[part.strip() for part in line] for line in lines] == [
        ["port: 1", f"{file}:1"],
        ['log_level: "debug"', "flag --log-level"],
        ["timeouts:"],
        ["connect: 2.0", "PD_PROXY_TIMEOUTS__CONNECT"],
        ["idle: 5.0", f"{file}:3"],
    ]
    assert "# default" in shown.in_force(found.settings, found.origins)


def test_secrets_are_masked_everywhere() -> None:
    found = gather(SECRETS, None, {})
    told = [
        shown.in_force(found.settings, found.origins),
        shown.as_json(found.settings, found.origins),
        str(shown.not_defaults(found.settings)),
    ]
    for text in told:
        assert "hush" not in text
        assert text.count(shown.MASK) == 6
    assert json.loads(told[1])["clients"]["value"][0]["weight"] == 2


def test_settings_that_differ_from_their_defaults_are_listed() -> None:
    assert shown.not_defaults(Settings()) == {}
    settings = configure({"port": "8000", "host": "10.0.0.1", "timeouts": {"idle": "7"}}, None, {})
    assert shown.not_defaults(settings) == {"host": "10.0.0.1", "timeouts.idle": 7.0}


def test_the_annotated_file_is_the_one_in_config() -> None:
    file = Path(__file__).parents[2] / "config" / "pd-proxy.yaml"
    assert shown.annotated_file() == file.read_text(encoding="utf-8")
