"""The page of memory by which workers know of each other's load."""

from __future__ import annotations

import os

from proxy.fleet.backend import Backend, Lease
from proxy.fleet.board import Board, Exchange


def backends() -> list[Backend]:
    return [Backend("http://a", "decode"), Backend("http://b", "decode"), Backend("http://a", "prefill")]


def test_each_sees_what_the_others_have_and_not_its_own() -> None:
    board = Board(3)
    fleets = [backends() for _ in range(3)]
    exchanges = [Exchange(board, number) for number in range(3)]
    for exchange, fleet in zip(exchanges, fleets, strict=True):
        exchange.look(fleet)
    leases = [Lease(fleets[0][0], 100), Lease(fleets[1][0], 20), Lease(fleets[1][0], 3), Lease(fleets[2][2], 7)]
    for exchange, fleet in zip(exchanges, fleets, strict=True):
        exchange.look(fleet)
    seen = [[(b.elsewhere_requests, b.elsewhere_tokens) for b in fleet] for fleet in fleets]
    assert seen == [
        [(2, 23), (0, 0), (1, 7)],
        [(1, 100), (0, 0), (1, 7)],
        [(3, 123), (0, 0), (0, 0)],
    ]
    assert not exchanges[2].look(fleets[2])
    for lease in leases:
        lease.release()
    assert exchanges[2].look(fleets[2]), "somebody may be waiting for the room that there is now"
    assert fleets[2][0].elsewhere_requests == 0


def test_what_there_was_before_the_first_look_is_told_too() -> None:
    board = Board(2)
    one, other = backends(), backends()
    Lease(one[0], 9)
    Exchange(board, 0).look(one)
    Exchange(board, 1).look(other)
    assert (other[0].elsewhere_requests, other[0].elsewhere_tokens) == (1, 9)


def test_what_was_just_read_will_do() -> None:
    board, now = Board(2), 100.0
    one, other = backends(), backends()
    reader, writer = Exchange(board, 0, lambda: now), Exchange(board, 1)
    writer.look(other)
    reader.freshen(one)
    lease = Lease(other[0], 5)
    assert not reader.freshen(one)
    assert one[0].elsewhere_tokens == 0
    now += 0.006
    assert not reader.freshen(one)
    assert one[0].elsewhere_tokens == 5
    lease.release()
    now += 0.006
    assert reader.freshen(one)


def test_a_backend_that_has_left_is_told_of_no_more() -> None:
    board = Board(2)
    one, other = backends(), backends()
    exchange = Exchange(board, 0)
    exchange.look(one)
    lease = Lease(one[0], 5)
    exchange.forget(one[0])
    lease.release()
    Exchange(board, 1).look(other)
    assert other[0].elsewhere_requests == 0


def test_what_a_dead_worker_had_is_forgotten() -> None:
    board = Board(2)
    one, other = backends(), backends()
    Lease(one[1], 50)
    dead, living = Exchange(board, 0), Exchange(board, 1)
    dead.look(one)
    living.look(other)
    assert other[1].elsewhere_tokens == 50
    board.wipe(0)
    living.look(other)
    assert other[1].elsewhere_tokens == 0


def test_it_is_seen_across_a_fork() -> None:
    board = Board(2)
    child = os.fork()
    if child == 0:
        fleet = backends()
        fleet[0].inflight_requests, fleet[0].inflight_tokens = 4, 44
        Exchange(board, 0).look(fleet)
        os._exit(0)
    os.waitpid(child, 0)
    fleet = backends()[::-1]  # a backend has its place by its name, in whatever order it came
    Exchange(board, 1).look(fleet)
    assert (fleet[-1].elsewhere_requests, fleet[-1].elsewhere_tokens) == (4, 44)


def test_a_full_page_leaves_a_backend_to_each_worker() -> None:
    board = Board(2)
    many = [Backend(f"http://{number}", "decode") for number in range(1030)]
    exchange = Exchange(board, 0)
    exchange.look(many)
    assert board.row(Backend("http://one-more", "decode")) == -1
    Lease(many[0], 5)
    Lease(many[-1], 5)
    exchange.look(many)
    fleet = [Backend("http://0", "decode"), Backend("http://1029", "decode")]
    Exchange(board, 1).look(fleet)
    assert [backend.elsewhere_tokens for backend in fleet] == [5, 0]


def test_bounds_count_what_the_others_have() -> None:
    backend = Backend("http://a", "decode")
    backend.most_requests, backend.most_tokens = 4, 100
    backend.elsewhere_requests, backend.elsewhere_tokens = 3, 60
    assert backend.has_room(40)
    assert not backend.has_room(41)
    with Lease(backend, 1):
        assert not backend.has_room(1)
    backend.draining = True
    assert not backend.drained
    backend.elsewhere_requests = 0
    assert backend.drained
