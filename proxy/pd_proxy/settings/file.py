"""Reads a settings file, and the line of each setting in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pd_proxy.decoding import Undecodable, decode_text
from pd_proxy.settings.environment import put, variable
from pd_proxy.settings.problems import ConfigurationError
from pd_proxy.settings.tree import setting_names

_TEXT = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"
_PLACEHOLDER = re.compile(r"\$\{\w+[^}]*\}")


@dataclass(frozen=True, slots=True)
class File:
    """A settings file.

    Attributes:
        path: the path of the file.
        values: its settings, nested by groups.
        lines: the line of each setting by its dotted name, and of each item of a list by its number.
    """

    path: Path
    values: Mapping[str, Any]
    lines: Mapping[str, int] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether it sets nothing."""
        return not self.values


def read_file(path: Path) -> File:
    """Read a YAML settings file. A name may begin with its group: `timeouts.idle: 5`.

    Raises:
        ConfigurationError: the file cannot be read, is not YAML, is not a mapping, or sets a name twice.
    """
    text = _text(path)
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(_not_yaml(path, text, error)) from None
    except RecursionError:
        raise ConfigurationError(f"{path}: it is nested too deeply") from None
    except ValueError:
        raise ConfigurationError("\n".join(_unreadable(path, tree)) or f"{path}: not YAML") from None
    if values is None:
        return File(path, {})
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}:1: a settings file is a mapping of names to values")
    lines: dict[str, int] = {}
    problems = list(_walk(path, tree, "", lines, ()))
    if problems:
        raise ConfigurationError("\n".join(problems))
    return File(path, _spread(values), lines)


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ConfigurationError(f"{str(path)!r}: no such file") from None
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ConfigurationError(f"{path}: it is UTF-16, and not UTF-8 text")
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            decode_text(line)
        except Undecodable:
            raise ConfigurationError(f"{path}:{number}: it is not UTF-8 text") from None
    return decode_text(content, "utf-8-sig")


def _not_yaml(path: Path, text: str, error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, int(error.position)) + 1
        return f"{path}:{line}: not YAML: a control character"
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{path}: not YAML: {error}"
    problem = str(getattr(error, "problem", error))
    if "\\t" in problem:
        problem = "a tab; YAML is indented with spaces"
    elif "another document" in problem:
        problem = "a second document begins; a settings file has only one"
    return f"{path}:{mark.line + 1}:{mark.column + 1}: not YAML: {problem}"


def _unreadable(path: Path, node: yaml.Node | None) -> Iterator[str]:
    """An error for each value that looks like a date or a number but is neither."""
    if isinstance(node, yaml.ScalarNode):
        try:
            yaml.safe_load(node.value)
        except yaml.YAMLError:
            return
        except ValueError:
            shown = node.value if len(node.value) < 40 else f"{node.value[:37]}…"
            yield f"{path}:{node.start_mark.line + 1}: {shown} is neither a date nor a number; put text in quotes"
    elif isinstance(node, yaml.CollectionNode):
        for item in node.value:
            for part in item if isinstance(item, tuple) else (item,):
                yield from _unreadable(path, part)


def _walk(
    path: Path, node: yaml.Node | None, prefix: str, lines: dict[str, int], within: tuple[int, ...]
) -> Iterator[str]:
    """Note the line of every name in `lines`. Yields an error for each wrong name or value."""
    if id(node) in within:
        yield f"{path}:{(within and lines.get(prefix[:-1])) or 1}: {prefix[:-1]}: it contains itself"
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name, line = f"{prefix}{key.value}", key.start_mark.line + 1
            if key.tag == _MERGE:
                continue
            if key.tag != _TEXT:
                yield f"{path}:{line}: {name}: a name is text; put it in quotes"
            elif name in lines:
                yield f"{path}:{line}: {name}: it is set in line {lines[name]} already"
            lines.setdefault(name, line)
            yield from _walk(path, value, f"{name}.", lines, (*within, id(node)))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[f"{prefix}{index}"] = item.start_mark.line + 1
            yield from _walk(path, item, f"{prefix}{index}.", lines, (*within, id(node)))
    elif isinstance(node, yaml.ScalarNode) and (found := _PLACEHOLDER.search(node.value)):
        setting = re.sub(r"\.\d+", "", prefix[:-1])
        instead = f"; set {variable(setting)}, which overrides the file" if setting in setting_names() else ""
        line = node.start_mark.line + 1
        yield f"{path}:{line}: {setting}: {found[0]} is not replaced by a variable{instead}"


def _spread(values: dict[str, Any]) -> dict[str, Any]:
    """The values with names such as `timeouts.idle` as members of their groups."""
    spread = {name: value for name, value in values.items() if name not in setting_names() or "." not in name}
    for name, value in values.items():
        if name in setting_names() and "." in name:
            group = name.partition(".")[0]
            inner = spread.get(group)
            if inner is None or isinstance(inner, dict):  # otherwise it is wrong, and validation reports it
                spread[group] = dict(inner or {})
                put(spread, name, value)
    return spread
