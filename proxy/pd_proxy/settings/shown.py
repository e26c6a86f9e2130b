"""Prints the effective settings: all with their origins, or only those that are not defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pd_proxy.settings.load import DEFAULT
from pd_proxy.settings.tree import Settings, leaves

MASK = "********"
_FILE = "pd-proxy.yaml"
_COLUMN = 48  # where comments begin


def annotated_file() -> str:
    """The settings file that has every default and its reason. It is in the package, or in `config/` of a checkout."""
    inside = Path(__file__).parent / _FILE
    path = inside if inside.is_file() else Path(__file__).parents[3] / "config" / _FILE
    return path.read_text(encoding="utf-8")


def values_of(settings: Settings) -> dict[str, Any]:
    """The JSON values of all settings by dotted name, with secrets masked."""
    tree = settings.model_dump(mode="json")
    found = {}
    for name, _ in leaves():
        value: Any = tree
        for part in name.split("."):
            value = value[part]
        found[name] = value
    for name in ("admin_key", "backend_api_key", "handoff_key"):
        found[name] = None if getattr(settings, name) is None else MASK
    found["api_keys"] = [MASK] * len(settings.api_keys)
    found["clients"] = [{**client, "key": MASK} for client in found["clients"]]
    return found


def not_defaults(settings: Settings) -> dict[str, Any]:
    """The settings that do not have their defaults, with secrets masked."""
    usual = values_of(Settings())
    return {name: value for name, value in values_of(settings).items() if value != usual[name]}


def in_force(settings: Settings, origins: Mapping[str, str], *, changed: bool = False) -> str:
    """The effective settings in the form of a settings file, each with its origin as a comment.

    Arguments:
        changed: show only settings that were set.
    """
    return "".join(f"{line}\n" for line in _lines(settings, origins, changed)) or "# nothing is set\n"


def as_json(settings: Settings, origins: Mapping[str, str], *, changed: bool = False) -> str:
    """The same as JSON: `value` and `origin` of each setting by its dotted name."""
    shown = {
        name: {"value": value, "origin": origins.get(name, DEFAULT)}
        for name, value in values_of(settings).items()
        if not changed or name in origins
    }
    return json.dumps(shown, indent=2)


def _lines(settings: Settings, origins: Mapping[str, str], changed: bool) -> Iterator[str]:
    group = ""
    values = values_of(settings)
    single = [name for name in values if "." not in name]
    for name in single + [name for name in values if "." in name]:
        if changed and name not in origins:
            continue
        before, _, leaf = name.rpartition(".")
        if before != group:
            group = before
            yield f"{group}:"
        text = f"{'  ' if group else ''}{leaf}: {json.dumps(values[name], ensure_ascii=False)}"
        yield f"{text:<{_COLUMN}} # {origins.get(name, DEFAULT)}"
