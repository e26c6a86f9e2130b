"""A worker's place among the workers of one gateway."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pd_proxy.workers.load_table import LoadTable
from pd_proxy.workers.prefix_ring import PrefixRings


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What the supervisor passes to a worker that it makes.

    Attributes:
        worker: its number, from 0.
        workers: how many there are.
        directory: of the workers' sockets for each other; no other user may enter it.
        load_table: the shared memory with the load of all workers.
        prefixes: the shared memory with the prompts that each worker has sent to engines.
        ready: the end of a pipe; the worker writes a byte to it when it accepts connections.
    """

    worker: int
    workers: int
    directory: Path
    load_table: LoadTable
    prefixes: PrefixRings
    ready: int
