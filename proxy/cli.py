"""The command line: `serve`, `check`, `simulate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from proxy import __version__, drop_in
from proxy.configuration import ConfigurationError, configure, did_you_mean
from proxy.settings import leaves

EXIT_USAGE = 2
EXIT_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    try:
        return int(arguments.run(arguments))
    except ConfigurationError as error:
        for line in str(error).splitlines():
            print(f"pd-proxy: {line}", file=sys.stderr)
        return EXIT_USAGE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pd-proxy",
        description="A prefill-decode disaggregation gateway for LLM serving.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pd-proxy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="serve | check | simulate")
    _add_serve(commands)
    _add_check(commands)
    _add_simulate(commands, wanted="simulate" in argv)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [f"--{name}" for name, _ in leaves()] if arguments.command == "serve" else []
        hint = did_you_mean(unknown[0].partition("=")[0], known)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return arguments


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="run the gateway",
        description="Run the gateway. Every setting is also a line of the --config file and a PD_PROXY_ variable "
        "(timeouts.prefill is PD_PROXY_TIMEOUTS__PREFILL); flags win over variables, variables over the file.",
        allow_abbrev=False,
    )
    serve.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    for name, field in leaves():
        kwargs: dict[str, Any] = {"dest": f"setting:{name}", "metavar": _metavar(field), "help": _help(field)}
        if name in ("prefill", "decode", "mixed", "encode", "api_keys"):
            kwargs |= {"action": "append"}
        elif field.annotation is bool:
            kwargs |= {"nargs": "?", "const": "true"}
        flags = [f"--{name}"]
        if "_" in name:
            flags.append(f"--{name.replace('_', '-')}")
        serve.add_argument(*flags, **kwargs)
    drop_in.add_arguments(serve)
    serve.set_defaults(run=_serve)


def _add_check(commands: Any) -> None:
    check = commands.add_parser("check", help="say what is wrong with a settings file, and where", allow_abbrev=False)
    check.add_argument("file", type=Path, help="YAML file of settings")
    check.set_defaults(run=_check)


def _add_simulate(commands: Any, *, wanted: bool) -> None:
    """The simulator is loaded only where it may be `wanted`: it is 2 MB that a gateway does without."""
    simulate = commands.add_parser("simulate", help="run a simulated vLLM engine", allow_abbrev=False)
    if not wanted:
        return
    from proxy.simulator import command

    command.add_arguments(simulate)
    simulate.set_defaults(run=command.run)


def _serve(arguments: argparse.Namespace) -> int:
    from proxy.process import ListenError, serve
    from proxy.telemetry.logs import set_up_logging

    flags = _nested(
        {
            name.removeprefix("setting:"): ",".join(value) if isinstance(value, list) else value
            for name, value in vars(arguments).items()
            if name.startswith("setting:") and value is not None
        }
    )
    notices = drop_in.translate(arguments, flags)
    settings = configure(flags, arguments.config)
    set_up_logging(settings.log_level, settings.log_format)
    for notice in notices:
        print(f"pd-proxy: {notice}", file=sys.stderr)
    try:
        return serve(settings)
    except ListenError as error:
        print(f"pd-proxy: {error}", file=sys.stderr)
        return EXIT_FAILED


def _check(arguments: argparse.Namespace) -> int:
    settings = configure({}, arguments.file)
    groups = [
        group
        for group in settings.all_groups()
        if not settings.groups or group.prefill or group.decode or group.mixed or group.encode
    ]
    for group in groups:
        roles = ("prefill", "decode", "mixed", *(["encode"] if group.encode else []))
        pools = ", ".join(f"{len(getattr(group, role))} {role}" for role in roles)
        named = f"group {group.name}: " if settings.groups else ""
        print(f"{arguments.file}: good. {named}{pools} backend(s), connector {group.connector}, port {settings.port}")
    return 0


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"timeouts.prefill": 3} -> {"timeouts": {"prefill": 3}}"""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, leaf = name.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[leaf] = value
    return tree


def _metavar(field: FieldInfo) -> str:
    choices = getattr(field.annotation, "__args__", ())
    if choices and all(isinstance(choice, str) for choice in choices):
        return "|".join(choices) if len(choices) < 6 else "NAME"
    return "VALUE"


def _help(field: FieldInfo) -> str:
    default = field.default
    shown = "" if default in (PydanticUndefined, None, ()) else f" (default {default})"
    return f"{field.description}{shown}".replace("%", "%%")


if __name__ == "__main__":
    sys.exit(main())
