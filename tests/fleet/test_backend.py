"""Leases, and the end of the legs that wait for a backend that goes down."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.errors import BackendError, BackendLost
from pd_proxy.fleet.backend import Backend, Lease
from pd_proxy.handoff.coordinates import Coordinates

URL = "http://b:80"


def counts(backend: Backend) -> tuple[int, int]:
    return backend.inflight_requests, backend.inflight_tokens


def test_a_lease_counts_from_its_creation_to_its_release() -> None:
    backend = Backend(URL, "decode")
    with Lease(backend, 100):
        assert counts(backend) == (1, 100)
        with Lease(backend, 7):
            assert counts(backend) == (2, 107)
        assert counts(backend) == (1, 100)
    assert counts(backend) == (0, 0)


def test_releasing_a_lease_again_does_nothing() -> None:
    backend = Backend(URL, "decode")
    other = Lease(backend, 5)
    with Lease(backend, 100) as lease:
        lease.release()
        lease.release()
        assert counts(backend) == (1, 5)
    assert counts(backend) == (1, 5)
    other.release()
    assert counts(backend) == (0, 0)


def test_a_lease_is_released_when_its_leg_fails() -> None:
    backend = Backend(URL, "decode")
    with pytest.raises(ZeroDivisionError), Lease(backend, 100):
        raise ZeroDivisionError
    assert counts(backend) == (0, 0)


@given(st.lists(st.integers(0, 1000), max_size=10), st.randoms())
def test_counts_return_to_zero_in_whatever_order_leases_end(tokens: list[int], random: object) -> None:
    backend = Backend(URL, "decode")
    leases = [Lease(backend, number) for number in tokens]
    assert counts(backend) == (len(tokens), sum(tokens))
    random.shuffle(leases)  # type: ignore[attr-defined]
    with ExitStack() as stack:
        for lease in leases:
            stack.enter_context(lease)
        for lease in leases[::2]:
            lease.release()
    assert counts(backend) == (0, 0)


def test_a_backend_that_goes_down_calls_on_lost_of_its_leases() -> None:
    backend = Backend(URL, "decode")
    backend.mark_up()
    told: list[BackendError] = []
    waiting, streaming, released = (Lease(backend, 1) for _ in range(3))
    waiting.on_lost = told.append
    released.on_lost = told.append
    released.release()
    backend.mark_down("/health answered 503")
    assert not backend.up
    assert backend.reason == "/health answered 503"
    (error,) = told
    assert isinstance(error, BackendLost)
    assert str(error) == f"{URL} /health answered 503"
    assert counts(backend) == (2, 2)  # `on_lost` does not release the lease
    streaming.release()
    waiting.release()
    assert counts(backend) == (0, 0)


def test_a_lease_may_be_released_in_its_on_lost() -> None:
    backend = Backend(URL, "decode")
    leases = [Lease(backend, 1) for _ in range(3)]
    for lease in leases:
        lease.on_lost = lambda error, lease=lease: lease.release()  # type: ignore[misc]
    backend.mark_down("gone")
    assert counts(backend) == (0, 0)


def test_on_lost_of_other_backends_leases_is_not_called() -> None:
    one, two = Backend(URL, "decode"), Backend("http://c:80", "decode")
    lease = Lease(two, 1)
    lease.on_lost = lambda error: pytest.fail("told")
    one.mark_down("gone")
    lease.release()


def test_a_backend_begins_down_and_has_a_reason_until_it_is_up() -> None:
    backend = Backend(URL, "decode")
    assert (backend.up, backend.reason) == (False, "not probed yet")
    backend.mark_up()
    assert (backend.up, backend.reason) == (True, "")


def test_a_backend_is_drained_when_no_leg_runs_and_no_hand_off_is_open() -> None:
    backend = Backend(URL, "prefill")
    assert not backend.drained
    backend.draining = True
    assert backend.drained
    with Lease(backend, 1):
        assert not backend.drained
    backend.open_handoffs += 1
    assert not backend.drained
    backend.open_handoffs -= 1
    assert backend.drained


def test_the_last_lease_of_a_removed_backend_wakes_its_prober() -> None:
    backend = Backend(URL, "decode")
    Lease(backend, 1).release()
    assert not backend.attention.is_set()
    backend.removed = True
    Lease(backend, 1).release()
    assert backend.attention.is_set()


@pytest.mark.parametrize(
    ("models", "asked", "serves"),
    [
        (None, "m", True),
        (None, None, True),
        ({}, "m", False),
        ({}, None, True),
        ({"m": {}}, "m", True),
        ({"m": {}}, "other", False),
        ({"m": {}}, None, True),
    ],
)
def test_a_backend_with_unknown_models_serves_every_model(
    models: dict[str, dict[str, object]] | None, asked: str | None, serves: bool
) -> None:
    backend = Backend(URL, "decode")
    backend.models = models
    assert backend.serves(asked) is serves


def test_coordinates_from_a_hand_off_hold_until_the_backend_goes_down() -> None:
    backend = Backend(URL, "prefill")
    configured = Coordinates(host="a", port=1)
    backend.locate(configured)
    for port in (2, 3):
        backend.remember(Coordinates(host="b", port=port, engine_ids=("e",)))
        assert backend.coordinates.port == port
    backend.forget_location()
    assert backend.coordinates == configured
    backend.forget_location()
    assert backend.coordinates == configured
    backend.remember(Coordinates(host="b", port=2))
    backend.mark_down("/health answered 503")
    assert backend.coordinates == configured


def test_a_lease_is_on_the_named_rank_or_else_on_the_least_loaded_one() -> None:
    backend = Backend(URL, "decode")
    backend.locate(Coordinates(dp=3))
    assert backend.rank_names == (f"{URL}#0", f"{URL}#1", f"{URL}#2")
    leases = [Lease(backend, 10, rank) for rank in (1, None, 1, 9)]  # an engine may have returned with fewer ranks
    assert [lease.rank for lease in leases] == [1, 0, 1, 2]
    assert backend.ranks == [10, 20, 10]
    for lease in leases:
        lease.release()
    assert backend.ranks == [0, 0, 0]


def test_an_engine_that_returns_with_other_ranks_begins_with_none_of_them_loaded() -> None:
    backend = Backend(URL, "decode")
    backend.locate(Coordinates(dp=3))
    lease = Lease(backend, 10, 2)
    backend.rank_work[2] = 10
    backend.locate(Coordinates(dp=2))
    lease.release()
    assert (backend.ranks, backend.rank_work, len(backend.rank_names)) == ([0, 0], [0, 0], 2)
    backend.locate(Coordinates())
    assert (backend.ranks, backend.rank_work, backend.rank_names) == ([], [], ())
