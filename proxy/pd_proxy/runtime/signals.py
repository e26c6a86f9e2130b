"""What the process does on each signal.

TERM, INT and QUIT make it leave. HUP, USR1 and USR2 would end it at once and cut every stream, since that is what the
system does where nobody says otherwise; logrotate, a terminal or a habit sends them. They are logged, and nothing else
happens: settings are read once.
"""

from __future__ import annotations

import logging
import signal

log = logging.getLogger("pd_proxy")

LEAVING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
IGNORED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def ignore() -> None:
    """Have the signals of `IGNORED` do nothing, until somebody handles them."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)


def tell_ignored(number: int) -> None:
    """Log a signal of `IGNORED`."""
    name = signal.Signals(number).name
    if number == signal.SIGHUP:
        log.warning(
            "%s is ignored: settings are read once. Backends change at /admin/backends; for all else start a new "
            "gateway beside this one (reuse_port) or restart it",
            name,
        )
    else:
        log.warning("%s is ignored", name)
