"""A worker's place among the workers of one gateway."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pd_proxy.workers.load_table import LoadTable
from pd_proxy.workers.prefix_ring import PrefixRings


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What a worker is told when it is made.

    Attributes:
        worker: its number, from 0.
        workers: how many there are.
        directory: where each has a socket for the others; nobody else may enter it.
        load_table: by which they tell each other of their load.
        prefixes: by which they tell each other what they have sent to whom.
        ready: a pipe's end, on which it says that it accepts connections.
    """

    worker: int
    workers: int
    directory: Path
    load_table: LoadTable
    prefixes: PrefixRings
    ready: int
