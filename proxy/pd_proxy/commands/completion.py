"""The scripts with which shells complete commands, flags, and the words that settings may have."""

from __future__ import annotations

import argparse
from typing import get_args

SHELLS = ("bash", "zsh", "fish")


def script(parser: argparse.ArgumentParser, commands: dict[str, argparse.ArgumentParser], shell: str) -> str:
    """The completion script of one shell, which its user adds to the shell's start-up file.

    Arguments:
        parser, commands: the parsers of the whole command line. They are changed, and must not be used afterwards.
        shell: one of `SHELLS`.
    """
    import shtab

    from pd_proxy.settings.flags import fields_of

    for command in commands.values():
        fields = fields_of(command)
        for action in command._actions:
            words = get_args(fields[action.dest].annotation) if action.dest in fields else ()
            if words and all(isinstance(word, str) for word in words):
                action.choices = words
            elif action.metavar == "FILE" or action.dest == "file":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell))
