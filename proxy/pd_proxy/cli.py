"""The command line: `serve`, `check`, `config`, `doctor`, `explain`, `simulate`, `completion`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pd_proxy import __version__
from pd_proxy.commands.completion import SHELLS, script
from pd_proxy.settings import flags, shown
from pd_proxy.settings.load import did_you_mean, gather
from pd_proxy.settings.problems import ConfigurationError

log = logging.getLogger("pd_proxy")

SIMULATOR = "pd-proxy-simulator"
"""The distribution with the simulated engine."""
EXIT_USAGE = 2
EXIT_FAILED = 1
_COMMANDS = ("serve", "check", "config", "doctor", "explain", "simulate", "completion")
_ABOUT = (
    "Every setting is a flag, a line of the --config file (timeouts.first_token) and a variable "
    "(PD_PROXY_TIMEOUTS__FIRST_TOKEN). Flags override variables, and variables override the file."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status."""
    arguments = _parse(flags.in_kebab_case(sys.argv[1:] if argv is None else argv))
    try:
        return int(arguments.run(arguments))
    except ConfigurationError as error:
        for line in str(error).splitlines():
            print(f"pd-proxy: {line}", file=sys.stderr)
        return EXIT_USAGE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments. An unknown one ends the program with an error that names the most similar known one."""
    parser, commands = _parser(argv)
    if argv and not argv[0].startswith("-") and argv[0] not in _COMMANDS:
        parser.error(f"there is no command {argv[0]!r}{did_you_mean(argv[0], _COMMANDS)}: {' | '.join(_COMMANDS)}")
    if argv and argv[0].partition("=")[0] in flags_of(commands["serve"]) - flags_of(parser):
        parser.error(f"{argv[0]} is a flag of serve (did you mean pd-proxy serve {argv[0]}?)")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        known = flags_of(commands[arguments.command])
        hints = [did_you_mean(word.partition("=")[0], known) for word in unknown if word.startswith("-")]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(dict.fromkeys(hints))}")
    return arguments


def _parser(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the whole command line, and the parsers of the commands by name."""
    parser = argparse.ArgumentParser(
        prog="pd-proxy",
        description="A prefill-decode disaggregation gateway for LLM serving.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pd-proxy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(_COMMANDS))
    _add_serve(commands)
    _add_check(commands)
    _add_config(commands)
    _add_doctor(commands, wanted=not {"doctor", "completion"}.isdisjoint(argv))
    _add_explain(commands, wanted=not {"explain", "completion"}.isdisjoint(argv))
    _add_simulate(commands, argv)
    _add_completion(commands)
    return parser, dict(commands.choices)


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """The names of a parser's flags."""
    return {name for action in parser._actions for name in action.option_strings if name.startswith("--")}


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve", help="run the gateway", description=f"Run the gateway. {_ABOUT}", allow_abbrev=False, add_help=False
    )
    flags.add_settings(serve)
    serve.set_defaults(run=_serve)


def _add_check(commands: Any) -> None:
    check = commands.add_parser("check", help="say what is wrong with a settings file, and where", allow_abbrev=False)
    check.add_argument("file", type=Path, help="YAML file of settings")
    check.add_argument("--probe", action="store_true", help="ask the engines too; exit as doctor does")
    check.add_argument("--strict", action="store_true", help="exit with 1 when there are warnings")
    check.set_defaults(run=_check)


def _add_config(commands: Any) -> None:
    config = commands.add_parser(
        "config",
        help="show the settings in force and where each comes from, or a file with all defaults",
        description=f"Show the settings in force, each with where it comes from; secrets are masked. {_ABOUT}",
        allow_abbrev=False,
        add_help=False,
    )

    def own(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--default", action="store_true", help="print a settings file with every default explained")
        parser.add_argument("--changed", action="store_true", help="only what was set")
        parser.add_argument("--json", action="store_true", help="for programs: value and origin of each")

    flags.add_settings(config, own)
    config.set_defaults(run=_config)


def _add_doctor(commands: Any, *, wanted: bool) -> None:
    """Add `doctor`. Its modules, which are most of a gateway, are loaded only where it is `wanted`."""
    doctor = commands.add_parser(
        "doctor",
        help="examine all engines, try hand-offs between them, and print how to correct each fault",
        description="Ask every engine of the settings what it is, try hand-offs between them, and say what is wrong "
        "and what to do. Exits with 0 when all is well, 1 when all works and something could be better, 2 when an "
        f"engine or a pair does not work or the settings are wrong. {_ABOUT}",
        allow_abbrev=False,
        add_help=False,
    )
    if wanted:
        from pd_proxy.doctor import command

        flags.add_settings(doctor, command.add_arguments)
        doctor.set_defaults(run=_doctor)


def _add_explain(commands: Any, *, wanted: bool) -> None:
    """Add `explain`. Its HTTP client is loaded only where it is `wanted`."""
    explain = commands.add_parser(
        "explain",
        help="say where a running gateway would send a request, and why",
        description="Ask a running gateway where it would send a request with this body now, and why; the request is "
        "sent to no engine. Needs the gateway's admin key, or its admin socket; where neither is set, it works on the "
        "gateway's own machine. Exits with 0 with a decision, 1 when no backend could be given the request, 2 when the "
        "gateway could not be asked or refused the question.",
        allow_abbrev=False,
    )
    if not wanted:
        return
    from pd_proxy.commands import explain as command

    command.add_arguments(explain)
    explain.set_defaults(run=command.run)


def _add_simulate(commands: Any, argv: Sequence[str]) -> None:
    """Add `simulate`. The simulator takes 2 MB, so it is loaded only where `argv` may need it."""
    simulate = commands.add_parser("simulate", help="run a simulated vLLM engine", allow_abbrev=False)
    if {"simulate", "completion"}.isdisjoint(argv):
        return
    try:
        from pd_proxy_simulator import command
    except ModuleNotFoundError as error:
        if error.name != "pd_proxy_simulator":
            raise
        if argv[0] == "simulate":
            simulate.error(
                f"the simulated engine is not installed: install {SIMULATOR} {__version__} "
                "(in a checkout: pip install ./proxy/pd_proxy_simulator)"
            )
        return
    command.add_arguments(simulate)
    simulate.set_defaults(run=command.run)


def _add_completion(commands: Any) -> None:
    completion = commands.add_parser(
        "completion",
        help="print the script by which a shell completes this command",
        description="Print the script by which a shell completes this command. bash: add "
        "`source <(pd-proxy completion bash)` to ~/.bashrc. zsh: write it to a file named _pd-proxy in a folder of "
        "$fpath. fish: write it to ~/.config/fish/completions/pd-proxy.fish.",
        allow_abbrev=False,
    )
    completion.add_argument("shell", choices=SHELLS, help="which shell")
    completion.set_defaults(run=_completion)


def _completion(arguments: argparse.Namespace) -> int:
    print(script(*_parser(["completion"]), arguments.shell))
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from pd_proxy.process import ListenError, serve
    from pd_proxy.telemetry.logs import set_up_logging

    given, notices = flags.given(arguments)
    configuration = gather(given, arguments.config)
    settings = configuration.settings
    set_up_logging(settings.log_level, settings.log_format)
    changed = ", ".join(f"{name}={_shown(value)}" for name, value in shown.not_defaults(settings).items())
    log.info("pd-proxy %s starts; settings that are not defaults: %s", __version__, changed or "none")
    for notice in (*notices, *configuration.notes):
        log.info("%s", notice)
    for warning in (*flags.secrets_in(arguments), *configuration.warnings):
        log.warning("%s", warning)
    try:
        return serve(settings)
    except ListenError as error:
        log.error("%s", error)
        return EXIT_FAILED


def _check(arguments: argparse.Namespace) -> int:
    configuration = gather({}, arguments.file)
    settings, warnings = configuration.settings, configuration.warnings
    for note in configuration.notes:
        print(f"pd-proxy: note: {note}", file=sys.stderr)
    for warning in warnings:
        print(f"pd-proxy: warning: {warning}", file=sys.stderr)
    groups = [
        group
        for group in settings.all_groups()
        if not settings.groups or group.prefill or group.decode or group.mixed or group.encode
    ]
    verdict = f"{len(warnings)} warning(s)" if warnings else "good"
    for group in groups:
        roles = ("prefill", "decode", "mixed", *(["encode"] if group.encode else []))
        pools = ", ".join(f"{len(getattr(group, role))} {role}" for role in roles)
        named = f"group {group.name}: " if settings.groups else ""
        summary = f"{pools} backend(s), connector {group.connector}, port {settings.port}"
        print(f"{arguments.file}: {verdict}. {named}{summary}")
    status = EXIT_FAILED if warnings and arguments.strict else 0
    if arguments.probe:
        from pd_proxy.doctor import command

        return command.run(settings, pairs=0) or status
    return status


def _shown(value: object) -> str:
    return ",".join(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else str(value)


def _config(arguments: argparse.Namespace) -> int:
    if arguments.default:
        print(shown.annotated_file(), end="")
        return 0
    given, _ = flags.given(arguments)
    configuration = gather(given, arguments.config)
    if arguments.json:
        print(shown.as_json(configuration.settings, configuration.origins, changed=arguments.changed))
    else:
        print(shown.in_force(configuration.settings, configuration.origins, changed=arguments.changed), end="")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from pd_proxy.doctor import command

    given, notices = flags.given(arguments)
    configuration = gather(given, arguments.config)
    for notice in (*notices, *configuration.notes):
        print(f"pd-proxy: note: {notice}", file=sys.stderr)
    for warning in (*flags.secrets_in(arguments), *configuration.warnings):
        print(f"pd-proxy: warning: {warning}", file=sys.stderr)
    return command.run(configuration.settings, pairs=arguments.pairs, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
