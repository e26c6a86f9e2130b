"""Loads `Settings` from a file, the environment and flags, with errors that say what is wrong and where."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pd_proxy.settings.advice import advise, is_loopback
from pd_proxy.settings.bounds import ClientSettings
from pd_proxy.settings.engines import BackendGroup, Location
from pd_proxy.settings.environment import (
    CONFIG_VARIABLE,
    DEFAULTS_VARIABLE,
    PREFIX,
    Variables,
    read_variables,
    variable,
)
from pd_proxy.settings.problems import ConfigurationError, Misfit
from pd_proxy.settings.tree import Settings, build_settings, leaves, setting_names
from pd_proxy.settings.wording import wording

if TYPE_CHECKING:
    from pd_proxy.settings.file import File

_LISTS: dict[str, type[BaseModel]] = {"clients": ClientSettings, "groups": BackendGroup, "locations": Location}
"""The settings that are lists of groups. As a flag or a variable, each list is one setting."""
_KNOWN = [
    *(leaf for leaf, _ in leaves()),
    *Settings.model_fields,
    *(f"{group}.{name}" for group, model in _LISTS.items() for name in model.model_fields),
]
SECRET = frozenset({"api_keys", "admin_key", "backend_api_key", "handoff_key", "clients", "clients.key"})
"""The settings whose values are not shown."""
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Configuration:
    """The effective settings, their origins, and texts for the operator.

    Attributes:
        settings: the effective settings.
        origins: where each setting was set that does not have its default: a flag, a variable, or a line of the file.
        notes: information for the operator.
        warnings: settings that are allowed but probably not intended.
    """

    settings: Settings
    origins: Mapping[str, str]
    notes: list[str]
    warnings: list[str]


def configure(
    flags: Mapping[str, Any], file: Path | None = None, environment: Mapping[str, str] = os.environ
) -> Settings:
    """The effective settings. Flags override the environment, and the environment overrides the file.

    Arguments:
        flags: a nested mapping of the settings that were given as flags.
        file: the settings file; where None, the one that `PD_PROXY_CONFIG` names, if any.
    Raises:
        ConfigurationError
    """
    return gather(flags, file, environment).settings


def gather(
    flags: Mapping[str, Any], file: Path | None = None, environment: Mapping[str, str] = os.environ
) -> Configuration:
    """The effective settings with their origins, notes and warnings. The arguments are those of `configure`.

    Raises:
        ConfigurationError
    """
    if file is None and environment.get(CONFIG_VARIABLE):
        file = Path(environment[CONFIG_VARIABLE])
    source = None
    if file is not None:
        from pd_proxy.settings.file import read_file  # imported here, since a gateway without a file needs no YAML

        source = read_file(file)
    sources = _Sources(flags, read_variables(environment, setting_names()), source)
    problems = [f"{name}: no such setting{_like_variable(name)}" for name in sources.variables.unknown]
    problems += sources.variables.problems
    settings = None
    try:
        settings = build_settings(flags, source.values if source else {}, environment)
    except ValidationError as error:
        problems += [_explain(detail, sources) for detail in error.errors()]
    if problems or settings is None:
        raise ConfigurationError("\n".join(dict.fromkeys(problems)))
    return Configuration(settings, sources.origins(), _notes(sources), _warnings(settings, sources))


@dataclass(frozen=True, slots=True)
class _Sources:
    """The sources of settings, in the order of their priority."""

    flags: Mapping[str, Any]
    variables: Variables
    file: File | None

    def of(self, name: str) -> str:
        """The origin of a setting. For an item or a member that is missing, the origin of what should contain it.

        Arguments:
            name: the dotted name, with the numbers of items.
        """
        setting = ".".join(part for part in name.split(".") if not part.isdigit())
        top = setting.partition(".")[0]
        if top in (*_LISTS, "aliases"):  # as a flag or a variable, these are one setting
            setting = top
        if _value(self.flags, setting) is not None:
            return f"flag --{setting.replace('_', '-')}"
        if found := self.variables.origins.get(setting):
            return found
        if _value(self.variables.values, setting) is not None:  # an unknown member in a variable's JSON
            return variable(top)
        lines = self.file.lines if self.file is not None else {}
        item = name.rpartition(".")[0] if name != setting else ""  # a missing member has no line of its own
        line = lines.get(name) or lines.get(item) or lines.get(setting)
        if line is None and _value(self.variables.defaults, setting) is not None:
            return DEFAULTS_VARIABLE
        return f"{self.file.path}:{line}" if self.file is not None and line else ""

    def origins(self) -> dict[str, str]:
        """The origins of all settings that a source sets."""
        return {name: origin for name, _ in leaves() if self._set(name) and (origin := self.of(name))}

    def _set(self, name: str) -> bool:
        values = (self.flags, self.variables.values, self.file.values if self.file else {}, self.variables.defaults)
        return any(_value(tree, name) is not None for tree in values)


def _value(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _explain(detail: ErrorDetails, sources: _Sources) -> str:
    """An error as one line: the origin of the value, the name of the setting, and what is wrong."""
    path = [str(part) for part in detail["loc"]]
    name = ".".join(path)
    setting = ".".join(part for part in path if not part.isdigit())
    context = detail.get("ctx", {})
    if isinstance(misfit := context.get("error"), Misfit):
        where, setting = next(filter(None, map(sources.of, misfit.settings)), ""), ""
    else:
        where = sources.of(name)
    if detail["type"] == "extra_forbidden":
        what = f"no such setting{did_you_mean(setting, _KNOWN)}"
    else:
        what = wording(detail["type"], detail["input"], context, detail["msg"], secret=setting in SECRET)
    return ": ".join(part for part in (where, setting, what) if part)


def _notes(sources: _Sources) -> list[str]:
    services = sources.variables.services
    if not services:
        return []
    return [
        f"ignored, since Kubernetes has made them for Services: {', '.join(services)} "
        "(enableServiceLinks: false keeps them out of the pod)"
    ]


def _warnings(settings: Settings, sources: _Sources) -> list[str]:
    file = sources.file
    found = [f"{file.path}:1: it is empty, so it sets nothing"] if file is not None and not file.values else []
    usual = _value(sources.variables.defaults, "host")
    if usual is not None and is_loopback(settings.host) and not is_loopback(str(usual)):
        found.append(
            f"{sources.of('host')}: host: {settings.host} cannot be reached from outside of this container; set {usual}"
        )
    for advice in advise(settings):
        where = sources.of(advice.setting)
        found.append(f"{where}: {advice.text}" if where else advice.text)
    return found


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The text " (did you mean X?)", where a known name is similar to `name` or ends in it; else empty."""
    import difflib  # imported here, since it is needed only after a mistake

    known = list(known)
    last = name.lstrip("-")
    ending = [other for other in known if other.rpartition(".")[2] == last]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
    close = near or (ending if len(ending) == 1 else difflib.get_close_matches(name, known, n=1))
    return f" (did you mean {close[0]}?)" if close else ""


def _like_variable(name: str) -> str:
    """The same for a variable. The names are compared without their common prefix."""
    known = [variable(leaf).removeprefix(PREFIX) for leaf, _ in leaves()]
    return did_you_mean(name.upper().removeprefix(PREFIX), known).replace("mean ", f"mean {PREFIX}")
