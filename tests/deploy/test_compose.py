"""deploy/compose.yaml and the Prometheus settings beside it are consistent."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml
from pd_proxy.settings.load import configure
from pd_proxy_simulator import command

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
ENGINES = [name for name in SERVICES if name.startswith(("prefill", "decode"))]
PROMETHEUS: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())


def test_there_are_two_engines_of_each_role_a_gateway_and_prometheus() -> None:
    assert sorted(SERVICES) == ["decode-1", "decode-2", "gateway", "prefill-1", "prefill-2", "prometheus"]


def test_the_gateway_names_every_engine_under_its_role_and_waits_for_it() -> None:
    flags: dict[str, Any] = {"prefill": [], "decode": []}
    for word in SERVICES["gateway"]["command"]:
        role, _, url = word.removeprefix("--").partition("=")
        flags[role].append(url)
    settings = configure(flags, environment={})
    assert settings.prefill == ("http://prefill-1:8000", "http://prefill-2:8000")
    assert settings.decode == ("http://decode-1:8000", "http://decode-2:8000")
    assert SERVICES["gateway"]["depends_on"] == {name: {"condition": "service_healthy"} for name in ENGINES}


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_has_its_role_and_a_name_that_the_others_reach(name: str) -> None:
    program, subcommand, *flags = SERVICES[name]["entrypoint"]
    assert (program, subcommand) == ("pd-proxy", "simulate")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    config = command.config_from(parser.parse_args(flags))
    assert (config.role, config.side_host) == (name.partition("-")[0], name)
    assert config.host == "0.0.0.0"


def test_the_health_check_of_the_image_is_kept_for_engines_and_gateway() -> None:
    for name in (*ENGINES, "gateway"):
        assert SERVICES[name]["image"] == "pd-proxy"
        assert "test" not in SERVICES[name]["healthcheck"]
        assert SERVICES[name]["build"] == {"context": ".."}


def test_the_gateway_has_more_time_to_stop_than_it_needs() -> None:
    seconds = int(SERVICES["gateway"]["stop_grace_period"].removesuffix("s"))
    assert seconds > configure({}, environment={}).shutdown.grace + 5


def test_prometheus_scrapes_the_gateway_and_every_engine() -> None:
    (mount,) = SERVICES["prometheus"]["volumes"]
    assert (ROOT / "deploy" / mount.partition(":")[0]).samefile(ROOT / "deploy" / "prometheus.yml")
    targets = {
        job["job_name"]: [target for group in job["static_configs"] for target in group["targets"]]
        for job in PROMETHEUS["scrape_configs"]
    }
    assert targets == {"pd-proxy": ["gateway:8000"], "engines": [f"{name}:8000" for name in ENGINES]}


def test_every_published_port_is_published_once() -> None:
    published = [port.partition(":")[0] for service in SERVICES.values() for port in service.get("ports", ())]
    assert sorted(published) == ["8000", "9090"]
