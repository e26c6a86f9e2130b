"""From a file, the environment and flags to `Settings`, with errors that say what is wrong and where."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from proxy.settings import (
    CONFIG_VARIABLE,
    PREFIX,
    BackendGroup,
    ClientSettings,
    Location,
    Settings,
    build_settings,
    leaves,
    unknown_variables,
)

if TYPE_CHECKING:
    from proxy.settings_file import File

_LISTS: dict[str, type[BaseModel]] = {"clients": ClientSettings, "groups": BackendGroup, "locations": Location}
"""The settings that are lists of groups, each one setting as a flag or a variable."""
_KNOWN = [
    *(leaf for leaf, _ in leaves()),
    *Settings.model_fields,
    *(f"{group}.{name}" for group, model in _LISTS.items() for name in model.model_fields),
]
_SECRET = {"api_keys", "admin_key", "backend_api_key", "handoff_key", "clients", "clients.key"}


class ConfigurationError(Exception):
    """The settings cannot be used; the text has one line for each thing that is wrong."""


def configure(
    flags: Mapping[str, Any], file: Path | None = None, environment: Mapping[str, str] = os.environ
) -> Settings:
    """The settings in force: flags over environment over file.

    Arguments:
        flags: nested mapping of the settings given as flags.
        file: the settings file; else the one that `PD_PROXY_CONFIG` names, else none.
    Raises:
        ConfigurationError
    """
    if file is None and environment.get(CONFIG_VARIABLE):
        file = Path(environment[CONFIG_VARIABLE])
    source = None
    if file is not None:
        from proxy.settings_file import read_file  # a gateway without a file does without a reader of YAML

        source = read_file(file)
    problems = [f"{name}: no such setting{_like_variable(name)}" for name in unknown_variables(environment)]
    settings = None
    try:
        settings = build_settings(flags, source.values if source else {})
    except ValidationError as error:
        problems += [_explain(detail, flags, source, environment) for detail in error.errors()]
    except Exception as error:  # pydantic-settings wraps what a variable's text breaks in errors of its own
        problems.append(str(error))
    if problems or settings is None:
        raise ConfigurationError("\n".join(problems))
    return settings


def _explain(detail: ErrorDetails, flags: Mapping[str, Any], file: File | None, environment: Mapping[str, str]) -> str:
    """One line: where the value came from, the setting's name, what is wrong with it."""
    path = [str(part) for part in detail["loc"]]
    name = ".".join(path)
    setting = ".".join(part for part in path if not part.isdigit())
    if detail["type"] == "extra_forbidden":
        what = f"no such setting{did_you_mean(setting, _KNOWN)}"
    else:
        what = detail["msg"].removeprefix("Value error, ")
        if name:
            what = what[:1].lower() + what[1:]
        # Our own messages name what they are about; others get the value, unless it is a secret.
        if (
            name
            and detail["type"] != "value_error"
            and setting not in _SECRET
            and not isinstance(detail["input"], dict)
        ):
            what = f"{what}, not {detail['input']!r}"
    where = _source(setting, name, flags, file, environment)
    return ": ".join(part for part in (where, setting, what) if part)


def _source(
    setting: str, name: str, flags: Mapping[str, Any], file: File | None, environment: Mapping[str, str]
) -> str:
    top = setting.partition(".")[0]
    if top in (*_LISTS, "aliases"):  # one setting as a flag or a variable, whatever is in it
        setting = top
    value: Any = flags
    for part in setting.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is not None:
        return f"flag --{setting.replace('_', '-')}"
    variable = PREFIX + setting.upper().replace(".", "__")
    if variable in environment:
        return variable
    if file is None:
        return ""
    item = name.rpartition(".")[0]  # what lacks a member has no line for it
    line = file.lines.get(name) or file.lines.get(item) or file.lines.get(setting) or (1 if setting else None)
    return f"{file.path}:{line}" if line else str(file.path)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean X?)" where one of the known names is close to `name`, or ends in it, else nothing."""
    import difflib  # only for who has made a mistake

    known = list(known)
    last = name.lstrip("-")
    ending = [other for other in known if other.rpartition(".")[2] == last]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
    close = near or (ending if len(ending) == 1 else difflib.get_close_matches(name, known, n=1))
    return f" (did you mean {close[0]}?)" if close else ""


def _like_variable(name: str) -> str:
    """The same for a variable. The common prefix must not make any two alike."""
    known = [leaf.upper().replace(".", "__") for leaf, _ in leaves()]
    return did_you_mean(name.upper().removeprefix(PREFIX), known).replace("mean ", f"mean {PREFIX}")
