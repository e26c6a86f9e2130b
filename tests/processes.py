"""`pd-proxy serve` as a process of its own: started, observed by its log, and always ended."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from tests.support import until

_LISTENING = re.compile(r"listening on (http://\S+)$", re.MULTILINE)


@dataclass
class Process:
    """A gateway process, and the lines of its log so far."""

    process: asyncio.subprocess.Process
    log: list[str] = field(default_factory=list)

    def says(self, text: str) -> bool:
        """Whether a line of the log has the text."""
        return any(text in line for line in self.log)

    def listens(self) -> bool:
        """Whether it has logged its address. Fails where it has ended."""
        assert self.process.returncode is None, self.log
        return _LISTENING.search("".join(self.log)) is not None

    @property
    def url(self) -> str:
        """The first address at which it listens."""
        found = _LISTENING.search("".join(self.log))
        assert found is not None, self.log
        return found[1]

    @property
    def port(self) -> int:
        """The port of `url`."""
        return int(self.url.rsplit(":", 1)[1])

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def status(self) -> int:
        """Its exit status, for which this waits at most 20 s."""
        async with asyncio.timeout(20):
            return await self.process.wait()

    async def leave(self) -> int:
        """Send SIGTERM; returns its exit status."""
        self.signal(signal.SIGTERM)
        return await self.status()


def environment() -> dict[str, str]:
    """The environment without settings of the gateway."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PD_PROXY_")}


@asynccontextmanager
async def gateway(
    *flags: str, files: int = 0, inherit: socket.socket | None = None, **variables: str
) -> AsyncIterator[Process]:
    """A gateway process, which may not listen yet.

    Arguments:
        files: how many files it may have open; 0: as many as this process.
        inherit: a socket that it gets as file descriptor 3, as from systemd.
        variables: further variables of its environment.
    """
    number = inherit.fileno() if inherit is not None else None
    limit = f"ulimit -n {files}; " if files else ""
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", limit + 'LISTEN_PID=$$ exec "$@"', "sh"),
        *(sys.executable, "-m", "pd_proxy.cli", "serve", *flags),
        stderr=asyncio.subprocess.PIPE,
        pass_fds=() if number is None else (3,),
        preexec_fn=None if number is None else lambda: os.dup2(number, 3),
        env=environment() | ({} if number is None else {"LISTEN_FDS": "1"}) | variables,
    )
    started = Process(process)

    async def read() -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            started.log.append(line.decode())

    reading = asyncio.create_task(read())
    try:
        yield started
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reading


@asynccontextmanager
async def served(*flags: str, files: int = 0) -> AsyncIterator[Process]:
    """A gateway process that listens on a port that the kernel has chosen."""
    async with gateway("--port", "0", *flags, files=files) as started:
        await until(started.listens, 20)
        yield started


async def ready(http: httpx.AsyncClient) -> None:
    """Wait until the gateway of a client is ready."""
    async with asyncio.timeout(60):
        while (await http.get("/ready")).status_code != 200:
            await asyncio.sleep(0.02)
