"""What tests of the flow share."""

from __future__ import annotations

from pd_proxy_simulator import Simulator

from tests.support import Running, until


async def at_rest(running: Running, *engines: Simulator) -> None:
    """Nothing is in flight, held or pinned, and no engine has died."""
    await until(running.idle)
    for engine in engines:
        core = engine.engine
        assert core.dead is None
        await until(lambda core=core: not (core.running or core.waiting or core.used_blocks))  # type: ignore[misc]
