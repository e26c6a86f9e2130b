"""The signals that the process handles.

SIGTERM, SIGINT and SIGQUIT make it shut down. SIGHUP, SIGUSR1 and SIGUSR2, which for example logrotate or a closed
terminal send, end a process by default, and so would cut every stream. Here they are logged and have no other effect,
since settings are read only at the start.
"""

from __future__ import annotations

import logging
import signal

log = logging.getLogger("pd_proxy")

LEAVING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
IGNORED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def ignore() -> None:
    """Ignore the signals of `IGNORED` until a handler is set for them."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)


def log_ignored(number: int) -> None:
    """Log that a signal of `IGNORED` was received."""
    name = signal.Signals(number).name
    if number == signal.SIGHUP:
        log.warning(
            "%s is ignored: settings are read once. Backends change at /admin/backends; for all else start a new "
            "gateway beside this one (reuse_port) or restart it",
            name,
        )
    else:
        log.warning("%s is ignored", name)
