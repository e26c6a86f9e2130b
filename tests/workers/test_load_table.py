"""The shared memory page by which workers know each other's load."""

from __future__ import annotations

import asyncio
import os

from pd_proxy.fleet.backend import Backend, Lease
from pd_proxy.workers.load_table import LoadSync, LoadTable

from tests.support import soon, until


def backends() -> list[Backend]:
    return [Backend("http://a", "decode"), Backend("http://b", "decode"), Backend("http://a", "prefill")]


def sync(table: LoadTable, worker: int, fleet: list[Backend], freed: list[int] | None = None) -> LoadSync:
    return LoadSync(table, worker, fleet, lambda: freed is not None and freed.append(worker))


def test_each_worker_reads_the_others_load_without_its_own() -> None:
    table, freed = LoadTable(3), list[int]()
    fleets = [backends() for _ in range(3)]
    syncs = [sync(table, number, fleet, freed) for number, fleet in enumerate(fleets)]
    for one in syncs:
        one.read()
    leases = [Lease(fleets[0][0], 100), Lease(fleets[1][0], 20), Lease(fleets[1][0], 3), Lease(fleets[2][2], 7)]
    for one in syncs:
        one.read()
    seen = [[(b.elsewhere_requests, b.elsewhere_tokens) for b in fleet] for fleet in fleets]
    assert seen == [
        [(2, 23), (0, 0), (1, 7)],
        [(1, 100), (0, 0), (1, 7)],
        [(3, 123), (0, 0), (0, 0)],
    ]
    syncs[2].read()
    assert not freed
    for lease in leases:
        lease.release()
    syncs[2].read()
    assert freed == [2], "somebody may be waiting for the room that there is now"
    assert fleets[2][0].elsewhere_requests == 0


def test_load_from_before_the_first_read_is_read_too() -> None:
    table = LoadTable(2)
    one, other = backends(), backends()
    Lease(one[0], 9)
    sync(table, 0, one).read()
    sync(table, 1, other).read()
    assert (other[0].elsewhere_requests, other[0].elsewhere_tokens) == (1, 9)


def test_load_that_was_just_read_is_not_read_again() -> None:
    table, now = LoadTable(2), 100.0
    one, other = backends(), backends()
    reader = LoadSync(table, 0, one, lambda: None, clock=lambda: now)
    sync(table, 1, other).read()
    reader.refresh()
    Lease(other[0], 5)
    reader.refresh()
    assert one[0].elsewhere_tokens == 0
    now += 0.006
    reader.refresh()
    assert one[0].elsewhere_tokens == 5


def test_the_load_of_a_removed_backend_is_not_read() -> None:
    table = LoadTable(2)
    one, other = backends(), backends()
    leaving = sync(table, 0, one)
    leaving.read()
    lease = Lease(one[0], 5)
    leaving.forget(one[0])
    lease.release()
    sync(table, 1, other).read()
    assert other[0].elsewhere_requests == 0


async def test_a_worker_with_waiting_requests_soon_reads_what_the_others_free() -> None:
    table, freed = LoadTable(2), list[int]()
    one, other = backends(), backends()
    sync(table, 1, other).read()
    lease = Lease(other[0], 5)
    waits = 0
    waiting = sync(table, 0, one, freed)
    keeping_up = asyncio.create_task(waiting.run(lambda: waits))
    await until(lambda: one[0].elsewhere_requests == 1)
    waits = 1
    waiting.wake()
    lease.release()
    await soon(lambda: freed == [0], 0.2)  # and not only at the next periodic read
    keeping_up.cancel()


def test_the_load_of_a_dead_worker_is_dropped() -> None:
    table = LoadTable(2)
    one, other = backends(), backends()
    Lease(one[1], 50)
    dead, living = sync(table, 0, one), sync(table, 1, other)
    dead.read()
    living.read()
    assert other[1].elsewhere_tokens == 50
    table.wipe(0)
    living.read()
    assert other[1].elsewhere_tokens == 0


def test_load_is_shared_across_a_fork() -> None:
    table = LoadTable(2)
    child = os.fork()
    if child == 0:
        fleet = backends()
        fleet[0].inflight_requests, fleet[0].inflight_tokens = 4, 44
        sync(table, 0, fleet).read()
        os._exit(0)
    os.waitpid(child, 0)
    fleet = backends()[::-1]  # a backend's place follows from its name, whatever the order in which backends are added
    sync(table, 1, fleet).read()
    assert (fleet[-1].elsewhere_requests, fleet[-1].elsewhere_tokens) == (4, 44)


def test_a_backend_without_a_place_in_a_full_page_is_counted_by_each_worker_alone() -> None:
    table = LoadTable(2)
    many = [Backend(f"http://{number}", "decode") for number in range(1030)]
    sync(table, 0, many).read()
    assert table.row(Backend("http://one-more", "decode")) == -1
    Lease(many[0], 5)
    Lease(many[-1], 5)
    fleet = [Backend("http://0", "decode"), Backend("http://1029", "decode")]
    sync(table, 1, fleet).read()
    assert [backend.elsewhere_tokens for backend in fleet] == [5, 0]


def test_bounds_include_the_other_workers_load() -> None:
    backend = Backend("http://a", "decode")
    backend.most_requests, backend.most_tokens = 4, 100
    backend.elsewhere_requests, backend.elsewhere_tokens = 3, 60
    assert backend.has_capacity(40)
    assert not backend.has_capacity(41)
    with Lease(backend, 1):
        assert not backend.has_capacity(1)
    backend.draining = True
    assert not backend.drained
    backend.elsewhere_requests = 0
    assert backend.drained
