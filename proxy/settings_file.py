"""A settings file and where each of its settings stands in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from proxy.configuration import ConfigurationError


@dataclass(frozen=True, slots=True)
class File:
    """A settings file: its values, and the line of each key by dotted name."""

    path: Path
    values: Mapping[str, Any]
    lines: Mapping[str, int]


def read_file(path: Path) -> File:
    """Read a YAML settings file.

    Raises:
        ConfigurationError: it cannot be read, is not YAML, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigurationError(f"{path}: {why}") from None
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigurationError(f"{where}: not YAML: {getattr(error, 'problem', error)}") from None
    if values is None:
        return File(path, {}, {})
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}:1: a settings file is a mapping of names to values")
    lines: dict[str, int] = {}
    _note_lines(tree, "", lines)
    return File(path, values, lines)


def _note_lines(node: yaml.Node | None, prefix: str, lines: dict[str, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            lines[name] = key.start_mark.line + 1
            _note_lines(value, f"{name}.", lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[f"{prefix}{index}"] = item.start_mark.line + 1
            _note_lines(item, f"{prefix}{index}.", lines)
