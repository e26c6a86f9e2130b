"""The parts that connect a worker with the other workers of its gateway."""

from __future__ import annotations

from typing import Any

import msgspec

from pd_proxy.admission.admission import Admission
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.prefix.index import PrefixIndex
from pd_proxy.workers.context import WorkerContext
from pd_proxy.workers.load_table import LoadSync
from pd_proxy.workers.peers import PeerWorkers
from pd_proxy.workers.prefix_ring import PeerPrefixes


class Peers(msgspec.Struct, frozen=True):
    """The parts that connect a worker with the other workers.

    Attributes:
        load_sync: keeps the load of this worker and of the others in step, in shared memory.
        workers: sends requests to the other workers.
    """

    load_sync: LoadSync
    workers: PeerWorkers


def make_peers(context: WorkerContext, fleet: Fleet, admission: Admission, index: PrefixIndex) -> Peers:
    """Make these parts, and connect the fleet and admission with the shared load."""
    prefixes = PeerPrefixes(context.prefixes, context.worker, index)
    load_sync = LoadSync(context.load_table, context.worker, fleet, admission.recheck, prefixes.read)
    fleet.before_choice = load_sync.refresh
    admission.on_wait = load_sync.wake
    return Peers(load_sync, PeerWorkers(context.directory, context.worker, context.workers))


def adopt_backends(fleet: Fleet, known: list[dict[str, Any]]) -> None:
    """Take over the backends of the other workers: operators may have changed them since the settings were read.

    Arguments:
        known: the backends as another worker's `/admin/backends` shows them; empty where no other worker answered.
    """
    if not known:
        return
    for backend in list(fleet):
        if not any(backend.url == other["url"] and backend.role == other["role"] for other in known):
            fleet.remove(backend.url, backend.role)
    for other in known:
        backend = fleet.add(other["url"], other["role"], other["group"])
        if other["removed"]:
            fleet.remove(backend.url, backend.role)
        elif other["draining"]:
            fleet.drain(backend)
