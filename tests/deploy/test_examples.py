"""The files in config/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pd_proxy.cli import main
from pd_proxy.settings.tree import Settings, build_settings, leaves
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "config").iterdir())
FULL = ROOT / "config" / "pd-proxy.yaml"


def names(tree: dict[str, Any], prefix: str = "") -> set[str]:
    """The dotted names of a settings file's values."""
    found = set()
    for key, value in tree.items():
        found |= names(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key}
    return found


def value_of(settings: BaseModel, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_pd_proxy_check_accepts_every_example(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(path)]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"{path}: ")
    openly = "0.0.0.0" in path.read_text().partition("host: ")[2].partition(" ")[0]
    assert told.err.count("warning:") == openly, told.err


def test_the_full_example_names_every_setting() -> None:
    assert names(yaml.safe_load(FULL.read_text())) == {name for name, _ in leaves()}


def test_the_full_example_gives_the_defaults_except_for_its_backends() -> None:
    example = build_settings({}, yaml.safe_load(FULL.read_text()))
    default = Settings()
    for name, _ in leaves():
        if name not in ("prefill", "decode"):
            assert value_of(example, name) == value_of(default, name), name


def test_the_tutorials_example_is_one_pair_of_ascend_engines_at_the_address_that_its_client_uses() -> None:
    settings = build_settings({}, yaml.safe_load((ROOT / "config" / "qwen3-235b-atlas-a3.yaml").read_text()))
    assert (len(settings.prefill), len(settings.decode), settings.mixed) == (1, 1, ())
    assert (settings.connector, settings.port) == ("mooncake_ascend", 12347)
