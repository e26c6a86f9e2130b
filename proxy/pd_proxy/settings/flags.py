"""The settings as flags of a command: their names, their help in sections, and their values.

A flag is written in kebab-case (`--log-format`, `--timeouts.first-token`); underscores are accepted in its place.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pd_proxy.settings import drop_in
from pd_proxy.settings.environment import variable
from pd_proxy.settings.secrets import REFERENCES
from pd_proxy.settings.tree import Settings, leaves
from pd_proxy.settings.types import Group

COMMON = (
    *("host", "port", "workers", "prefill", "decode", "mixed", "kind", "connector"),
    *("api_keys", "admin_key", "backend_api_key", "log_level", "log_format", "access_log"),
)
"""The settings that `--help` shows."""

_SECTIONS = {
    "listening": ("host", "port", "reuse_port", "workers"),
    "backends": (
        "prefill",
        "decode",
        "mixed",
        "encode",
        "kind",
        "connector",
        "groups",
        "locations",
        "warmup",
        "ready_by_fallback",
    ),
    "models": ("aliases", "default_model", "unknown_model", "pair_revisions"),
    "requests": ("fallback", "resume", "first_token", "reuse_tokens"),
    "keys": ("api_keys", "clients", "admin_key", "admin_socket", "backend_api_key", "handoff_key"),
    "logs": ("log_level", "log_format", "access_log", "throughput_interval"),
}
"""The settings that are in no group, by subject. Those that are missing here are shown under "other"."""
_SCRIPT = "example-script"
_REPEATED = ("prefill", "decode", "mixed", "encode", "api_keys")
_SECRETS = ("api_keys", "admin_key", "backend_api_key", "handoff_key", "clients")
_DESTINATION = "setting:"
_HELP = ("-h", "--help")
_HELP_ABOUT = "show this help; all: every setting; SECTION: those of one section"


@dataclass(frozen=True, slots=True)
class Section:
    """Settings that the help shows together."""

    title: str
    about: str
    settings: list[tuple[str, FieldInfo]]


def flag(name: str) -> str:
    """A setting's flag: `log_format` is `--log-format`."""
    return f"--{name.replace('_', '-')}"


def in_kebab_case(argv: Sequence[str]) -> list[str]:
    """The same arguments with hyphens instead of underscores in the names of flags."""
    written = []
    for argument in argv:
        name, sign, value = argument.partition("=")
        written.append(f"{name.replace('_', '-')}{sign}{value}" if name.startswith("--") else argument)
    return written


def sections() -> list[Section]:
    """All settings in sections: those of no group by subject, then the groups."""
    every = dict(leaves())
    found = [Section(title, "", [(name, every.pop(name)) for name in names]) for title, names in _SECTIONS.items()]
    single = [(name, field) for name, field in every.items() if "." not in name]
    if single:
        found.append(Section("other", "", single))
    for group in dict.fromkeys(name.partition(".")[0] for name in every if "." in name):
        model = Settings.model_fields[group].annotation
        about = inspect.getdoc(model) or "" if isinstance(model, type) else ""
        about = "" if about == inspect.getdoc(Group) else about.partition(" ([")[0].replace("\n", " ").rstrip(".") + "."
        found.append(Section(group, about, [(name, every[name]) for name in every if name.startswith(f"{group}.")]))
    return found


def add_settings(parser: argparse.ArgumentParser, own: Callable[[argparse.ArgumentParser], object] = id) -> None:
    """Add every setting, `--config`, the flags of the example script, and a `--help` in sections.

    Arguments:
        parser: made with `add_help=False`.
        own: adds the command's other flags to a parser.
    """
    parser.usage = f"{parser.prog} [--config FILE] [--SETTING VALUE ...]"
    parser.add_argument(*_HELP, nargs="?", const="", action=_Help, own=own, metavar="all|SECTION", help=_HELP_ABOUT)
    own(parser)
    _add_config(parser)
    for section in sections():
        _add_section(parser, section)
    drop_in.add_arguments(parser)


def fields_of(parser: argparse.ArgumentParser) -> dict[str, FieldInfo]:
    """The settings among a parser's flags, by argparse's `dest` of the flag."""
    every = {f"{_DESTINATION}{name}": field for name, field in leaves()}
    return {action.dest: every[action.dest] for action in parser._actions if action.dest in every}


def given(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The settings that were given as flags, as a nested mapping; and notices for the user.

    Raises:
        ConfigurationError: flags of the example script contradict each other.
    """
    tree: dict[str, Any] = {}
    for destination, value in vars(arguments).items():
        if not destination.startswith(_DESTINATION) or value is None:
            continue
        *groups, leaf = destination.removeprefix(_DESTINATION).split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[leaf] = ",".join(value) if isinstance(value, list) else value
    return tree, drop_in.translate(arguments, tree)


def secrets_in(arguments: argparse.Namespace) -> list[str]:
    """A warning for each secret in a flag, which every user of the machine can read."""
    return [
        f"{flag(name)}: every user of this machine can read it in the list of processes; use {flag(name)} file:PATH, "
        f"{flag(name)} env:NAME, {variable(name)} or the settings file"
        for name in _SECRETS
        if (value := getattr(arguments, f"{_DESTINATION}{name}", None)) is not None and not _only_refers(value)
    ]


def _only_refers(value: str | list[str]) -> bool:
    """Whether all secrets are references: `file:PATH` or `env:NAME`."""
    text = ",".join(value) if isinstance(value, list) else value
    if text.lstrip().startswith("["):  # clients, as JSON
        keys = re.findall(r'"key"\s*:\s*"([^"]*)', text)
        return all(key.startswith(REFERENCES) for key in keys)
    return all(part.strip().startswith(REFERENCES) for part in text.split(","))


def _add_config(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")


def _add_section(parser: argparse.ArgumentParser, section: Section) -> None:
    group = parser.add_argument_group(section.title, section.about or None)
    for name, field in section.settings:
        _add_setting(group, name, field)


def _add_setting(parser: argparse._ActionsContainer, name: str, field: FieldInfo) -> None:
    kwargs: dict[str, Any] = {"dest": f"{_DESTINATION}{name}", "metavar": _metavar(name, field), "help": _help(field)}
    if name in _REPEATED:
        kwargs |= {"action": "append"}
    elif field.annotation is bool:
        kwargs |= {"nargs": "?", "const": "true"}
    parser.add_argument(flag(name), **kwargs)


class _Help(argparse.Action):
    """The action of `--help`: it shows the common settings; with `all` all settings, with `timeouts` that section."""

    def __init__(self, *, own: Callable[[argparse.ArgumentParser], object], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._own = own

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        titles = [*(section.title for section in sections()), _SCRIPT]
        if values not in ("", "all", *titles):
            parser.error(f"there is no section {values!r} of settings; there are: all, {', '.join(titles)}")
        shown = argparse.ArgumentParser(
            prog=parser.prog,
            usage=parser.usage,
            description=parser.description,
            add_help=False,
            epilog=f"Underscores may stand for the hyphens of a flag. Sections for --help: all, {', '.join(titles)}.",
        )
        shown.add_argument(*_HELP, nargs="?", metavar="all|SECTION", help=self.help)
        self._own(shown)
        _add_config(shown)
        if values == "":
            every = dict(leaves())
            _add_section(shown, Section("common settings", "", [(name, every[name]) for name in COMMON]))
        for section in sections():
            if values in ("all", section.title):
                _add_section(shown, section)
        if values in ("all", _SCRIPT):
            drop_in.add_arguments(shown)
        shown.print_help()
        parser.exit()


def _metavar(name: str, field: FieldInfo) -> str:
    kind = field.annotation
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return "|".join(choices) if len(choices) < 8 else "NAME"
    if kind is bool:
        return "true|false"
    if name in _REPEATED[:4]:
        return "URL"
    return "N" if kind in (int, int | None) else "NUMBER" if kind in (float, float | None) else "VALUE"


def _help(field: FieldInfo) -> str:
    default = field.default
    if isinstance(default, bool):
        default = str(default).lower()
    shown = "" if default in (PydanticUndefined, None, (), {}, "") else f" (default {default})"
    return f"{field.description}{shown}".replace("%", "%%")
