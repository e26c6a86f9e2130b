"""What a worker knows of the other workers of its gateway."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pd_proxy.workers.load_table import LoadTable
from pd_proxy.workers.prefix_ring import PrefixRings


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What the supervisor passes to a worker that it forks.

    Attributes:
        worker: the worker's number, from 0.
        workers: how many workers there are.
        directory: holds the sockets by which the workers reach each other; closed to other users.
        load_table: the shared memory with the load of all workers.
        prefixes: the shared memory with the prompts that each worker has sent to engines.
        ready: the writing end of a pipe. The worker writes a byte to it once it accepts connections.
    """

    worker: int
    workers: int
    directory: Path
    load_table: LoadTable
    prefixes: PrefixRings
    ready: int
