"""Virtual time: an event loop that never waits for a timer, over real sockets.

When no socket has anything, the clock moves on to the next timer at once. So a timeout of seconds costs nothing, and a
slow or busy machine makes none fire early: time passes only while everybody waits. The gateway reads `time.monotonic`
as well; `virtual_time` lets its modules read this clock.
"""

from __future__ import annotations

import asyncio
import selectors
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import monotonic
from types import ModuleType
from unittest import mock

# Loopback delivers what is sent before `send` returns, but a busy kernel may put it off. So before a leap that could
# reach somebody's timeout, sockets get a real millisecond.
_LEAP = 0.02
_GRACE = 0.001


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is `now`."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now


class _Selector(selectors.DefaultSelector):
    """Looks at the sockets; instead of waiting for them it moves the clock."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if found or (timeout is not None and timeout <= 0):
            return found
        if timeout is None:
            return super().select(1.0)  # no timer at all: only something outside can go on
        if timeout > _LEAP and (found := super().select(_GRACE)):
            return found
        self._loop.now += timeout
        return []


@contextmanager
def virtual_time() -> Iterator[asyncio.Runner]:
    """A runner in virtual time. All modules of the gateway read its clock until the end."""
    loops: list[VirtualLoop] = []

    def new_loop() -> VirtualLoop:
        loops.append(VirtualLoop())
        return loops[-1]

    def now() -> float:
        return loops[-1].now

    with ExitStack() as stack:
        for module in [
            module
            for name, module in sys.modules.items()
            if name.partition(".")[0] in ("pd_proxy", "pd_proxy_simulator")
        ]:
            _give(module, now, stack)
        yield stack.enter_context(asyncio.Runner(loop_factory=new_loop))


def _give(module: ModuleType, clock: Callable[[], float], stack: ExitStack) -> None:
    """Replace what a module has taken of `time.monotonic`: its global, and defaults of its functions."""
    for name, value in vars(module).items():
        if value is monotonic:
            stack.enter_context(mock.patch.object(module, name, clock))
        functions = vars(value).values() if isinstance(value, type) else (value,)
        for function in functions:
            defaults = getattr(function, "__kwdefaults__", None)
            for key in [key for key, default in (defaults or {}).items() if default is monotonic]:
                stack.enter_context(mock.patch.dict(defaults, {key: clock}))
