"""Whether and when a request may start."""

from __future__ import annotations

import pytest
from pd_proxy.admission.clients import Level
from pd_proxy.errors import (
    DeadlineTooClose,
    Draining,
    GatewayError,
    QueueFull,
    RateLimited,
    TargetMissed,
    TooManyTokens,
)

from tests.admission.helpers import Decisions, Slots, client, schedule, ticket


def refusal(kind: type[GatewayError]) -> pytest.RaisesContext[GatewayError]:
    return pytest.raises(kind)


def test_a_request_that_fits_starts_at_once_and_one_that_does_not_waits() -> None:
    plan, one, decisions = schedule(requests=2, tokens=25), client(), Decisions()
    first, second = ticket(one, 10), ticket(one, 10)
    plan.arrive(first)
    plan.arrive(second)
    assert (first.state, second.state, plan.requests, plan.tokens) == ("running", "running", 2, 20)
    third = decisions.listen(ticket(one, 1))
    plan.arrive(third)
    assert (third.state, plan.waiting) == ("waiting", 1)
    plan.admit(1.0)
    assert decisions.all == []
    plan.leave(first, 2.0)
    plan.admit(2.0)
    assert decisions.let_in == [third] and plan.requests == 2 and plan.tokens == 11


def test_a_large_head_is_not_passed_by_small_ones_and_gets_its_turn() -> None:
    plan, one, decisions = schedule(tokens=100), client(), Decisions()
    other = client("other", one.level)
    running = [ticket(other, 20) for _ in range(5)]
    for each in running:
        plan.arrive(each)
    large = decisions.listen(ticket(one, 90))
    small = decisions.listen(ticket(one, 1))
    plan.arrive(large)
    plan.arrive(small)
    for each in running[:4]:
        plan.leave(each, 1.0)
        plan.admit(1.0)
    assert decisions.let_in == [], "there was capacity for the small one all the time"
    plan.leave(running[4], 1.0)
    plan.admit(1.0)
    assert decisions.let_in == [large, small]


def test_a_new_request_does_not_pass_waiting_ones() -> None:
    plan, one = schedule(tokens=10), client()
    plan.arrive(ticket(one, 8))
    plan.arrive(ticket(one, 8))
    newcomer = ticket(client("b", one.level), 1)
    plan.arrive(newcomer)
    assert newcomer.state == "waiting"


def test_a_request_that_could_never_fit_is_refused_without_retry_after() -> None:
    for settings in ({"tokens": 100}, {"decode_tokens": 100}, {"decode_tokens": 100, "tokens": 1000}):
        plan, one = schedule(**settings), client()
        with refusal(TooManyTokens) as caught:
            plan.arrive(ticket(one, 101))
        assert (caught.value.status, caught.value.retry_after) == (400, None)
        assert (one.requests, one.tokens) == (0, 0)


def test_a_clients_own_bounds_include_waiting_requests_and_lead_to_429() -> None:
    plan, one = schedule(requests=1), client(max_requests=2, max_tokens=100)
    with refusal(TooManyTokens):
        plan.arrive(ticket(one, 101))
    plan.arrive(ticket(one, 50))
    with refusal(RateLimited) as caught:
        plan.arrive(ticket(one, 51))
    assert (caught.value.status, caught.value.type, caught.value.retry_after) == (429, "rate_limit_error", 1)
    plan.arrive(waiting := ticket(one, 50))
    assert waiting.state == "waiting"
    with refusal(RateLimited):
        plan.arrive(ticket(one, 1))
    other = ticket(client("b", one.level), 1)
    plan.arrive(other)
    assert other.state == "waiting", "one client's bound is nobody else's"


def test_the_retry_after_of_a_client_is_the_time_until_one_of_its_own_ends() -> None:
    plan, one = schedule(), client(max_requests=2)
    for _ in range(8):
        plan.arrive(done := ticket(one, now=0.0))
        plan.leave(done, 20.0)
    for _ in range(2):
        plan.arrive(ticket(one))
    with refusal(RateLimited) as caught:
        plan.arrive(ticket(one))
    assert caught.value.retry_after == 10


# The queue's bounds


def test_a_full_queue_refuses_with_retry_after() -> None:
    plan, one = schedule(requests=1, queue=2), client()
    for _ in range(3):
        plan.arrive(ticket(one))
    with refusal(QueueFull) as caught:
        plan.arrive(ticket(one))
    assert (caught.value.status, caught.value.retry_after) == (503, 1)
    assert (plan.waiting, one.requests) == (2, 3)


def test_a_queue_of_length_zero_refuses_what_cannot_start() -> None:
    plan, one = schedule(requests=1, queue=0), client()
    plan.arrive(ticket(one))
    with refusal(QueueFull):
        plan.arrive(ticket(client("b", Level(1))))


def test_the_bodies_of_waiting_requests_are_bounded() -> None:
    plan, one = schedule(requests=1, queue_bytes=1000), client()
    plan.arrive(ticket(one, size=10**9))
    plan.arrive(ticket(one, size=600))
    with refusal(QueueFull):
        plan.arrive(ticket(one, size=401))
    plan.arrive(ticket(one, size=400))


def test_one_client_cannot_fill_the_queue_against_others() -> None:
    plan, decisions, level = schedule(requests=1, queue=3), Decisions(), Level(0)
    hog, light = client("hog", level), client("light", level)
    plan.arrive(ticket(hog))
    hogs = [decisions.listen(ticket(hog)) for _ in range(3)]
    for each in hogs:
        plan.arrive(each)
    welcome = decisions.listen(ticket(light))
    plan.arrive(welcome)
    assert welcome.state == "waiting" and plan.waiting == 3
    assert decisions.refused == [(hogs[-1], "queue_full")]
    assert (hog.requests, hogs[-1].state) == (3, "gone")


# Deadlines


def test_a_request_that_cannot_make_its_deadline_is_refused_at_once() -> None:
    plan, one, now = schedule(requests=1, queue=1000), client(), 0.0
    plan.arrive(running := ticket(one))
    decisions = Decisions()
    for _ in range(40):
        plan.arrive(decisions.listen(ticket(one, timeout=1000.0)))
    for _ in range(20):  # one a second
        now += 1.0
        plan.leave(running, now)
        plan.admit(now)
        running = decisions.let_in[-1]
    assert plan.waiting == 20
    with refusal(DeadlineTooClose) as caught:
        plan.arrive(ticket(one, now=now, timeout=20.9))
    assert (caught.value.status, caught.value.retry_after) == (503, 20)
    plan.arrive(patient := ticket(one, now=now, timeout=21.1))
    assert patient.state == "waiting"
    hurried = ticket(client("b", one.level), now=now, timeout=3.0)
    plan.arrive(hurried)
    assert hurried.state == "waiting", "another key's share comes sooner"


def test_an_empty_queue_accepts_a_request_however_slow_it_was() -> None:
    plan, one, now = schedule(requests=1), client(), 0.0
    plan.arrive(running := ticket(one))
    decisions = Decisions()
    for _ in range(6):
        plan.arrive(decisions.listen(ticket(one, timeout=1e6)))
    for _ in range(6):
        now += 9.0
        plan.leave(running, now)
        plan.admit(now)
        running = decisions.let_in[-1]
    plan.arrive(alone := ticket(one, now=now, timeout=5.0))
    assert alone.state == "waiting"
    with refusal(DeadlineTooClose):
        plan.arrive(ticket(one, now=now, timeout=5.0))


def test_a_request_past_its_deadline_is_refused_and_never_let_in() -> None:
    plan, one, decisions = schedule(requests=1), client(), Decisions()
    plan.arrive(running := ticket(one))
    plan.arrive(late := decisions.listen(ticket(one, timeout=5.0)))
    plan.arrive(later := decisions.listen(ticket(one, timeout=9.0)))
    plan.leave(running, 5.0)
    plan.admit(5.0)
    assert decisions.refused == [(late, "queue_timeout")] and decisions.let_in == [later]
    plan.expire(later, 9.0)
    assert later.state == "running", "a timer that comes too late changes nothing"


# Capacity of backends


def test_requests_for_other_models_go_on_while_one_is_full() -> None:
    capacity = Slots({"m": 1})
    plan, one, decisions = schedule(capacity), client(), Decisions()
    plan.arrive(first := ticket(one))
    place = capacity.reserve(first)
    plan.arrive(blocked := decisions.listen(ticket(one)))
    plan.arrive(other := decisions.listen(ticket(one, model="n")))
    plan.admit(0.0)
    assert decisions.let_in == [other] and blocked.state == "waiting"
    place.release()
    plan.admit(0.0)
    assert decisions.let_in == [other, blocked]
    assert capacity.taken["m"] == 1, "the capacity is kept for it until it takes it"
    plan.leave(blocked, 1.0)
    plan.leave(blocked, 1.0)
    assert capacity.taken["m"] == 0


def test_a_head_without_room_under_the_total_bound_holds_up_every_model() -> None:
    capacity = Slots({"m": 5})
    plan, one, decisions = schedule(capacity, tokens=100), client(), Decisions()
    plan.arrive(ticket(one, 50))
    plan.arrive(decisions.listen(ticket(one, 90)))
    plan.arrive(decisions.listen(ticket(one, 10, model="n")))
    plan.admit(0.0)
    assert decisions.all == []


# Ends


def test_leaving_releases_exactly_once_in_every_state() -> None:
    plan, one, decisions = schedule(requests=1), client(), Decisions()
    running, waiting = ticket(one), decisions.listen(ticket(one))
    plan.leave(ticket(one), 0.0)
    plan.arrive(running)
    plan.arrive(waiting)
    for _ in range(2):
        plan.leave(waiting, 1.0)
        plan.leave(running, 1.0)
    assert (plan.requests, plan.tokens, plan.waiting, one.requests, one.tokens) == (0, 0, 0, 0, 0)
    assert decisions.all == []


def test_all_waiting_requests_can_be_refused() -> None:
    plan, one, decisions = schedule(requests=1), client(), Decisions()
    plan.arrive(ticket(one))
    waiting = [decisions.listen(ticket(one)) for _ in range(3)]
    for each in waiting:
        plan.arrive(each)
    plan.refuse_all(lambda: Draining("leaving"), 1.0)
    assert decisions.refused == [(each, "draining") for each in waiting]
    assert (plan.waiting, plan.requests) == (0, 1)


# Shares and pace, as the schedule counts them


def test_clients_share_by_weight_in_what_is_let_in_from_the_queue() -> None:
    plan, decisions, level = schedule(requests=1), Decisions(), Level(0)
    light, heavy = client("light", level), client("heavy", level, weight=3.0)
    plan.arrive(running := ticket(light))
    for _ in range(40):
        plan.arrive(decisions.listen(ticket(light)))
    for _ in range(40):
        plan.arrive(decisions.listen(ticket(heavy)))
    for _ in range(40):
        plan.leave(running, 1.0)
        plan.admit(1.0)
        running = decisions.let_in[-1]
    assert abs(sum(t.client is heavy for t in decisions.let_in) - 30) <= 1


def test_time_with_an_empty_queue_does_not_lower_the_pace() -> None:
    plan, one, decisions, now = schedule(requests=1), client(), Decisions(), 0.0
    plan.arrive(running := ticket(one))
    for _ in range(10):
        plan.arrive(decisions.listen(ticket(one)))
    for _ in range(9):  # one a second
        now += 1.0
        plan.leave(running, now)
        plan.admit(now)
        running = decisions.let_in[-1]
    [last] = plan._queue
    plan.leave(last, now)
    now += 1000.0
    for _ in range(3):
        plan.arrive(new := ticket(one, now=now, timeout=5.0))
        assert new.state == "waiting"


def test_a_request_that_would_miss_its_ttft_target_is_refused_at_once_where_that_is_set() -> None:
    plan, one = schedule(slo="refuse"), client(target=1.0)
    plan.arrive(ticket(one, expected=0.9))
    with refusal(TargetMissed) as caught:
        plan.arrive(ticket(one, expected=3.5))
    assert caught.value.retry_after == 3 and "3.5 s" in str(caught.value) and "target of 1 s" in str(caught.value)
    assert (one.requests, plan.requests, plan.waiting) == (1, 1, 0)


def test_without_a_target_or_with_slo_off_no_request_is_late() -> None:
    hopeless = ticket(client(), expected=1e9)
    schedule(slo="refuse").arrive(hopeless)
    other = ticket(client(target=0.1), expected=1e9)
    schedule().arrive(other)
    assert hopeless.state == other.state == "running"
    assert not (hopeless.best_effort or other.best_effort)


def test_a_request_that_has_become_late_in_the_queue_is_refused_when_it_is_its_turn() -> None:
    plan, one, decisions = schedule(slo="refuse", requests=1), client(target=1.0), Decisions()
    running = ticket(one)
    plan.arrive(running)
    late, fresh = decisions.listen(ticket(one, expected=0.5)), decisions.listen(ticket(one, now=0.6, expected=0.1))
    plan.arrive(late)
    plan.arrive(fresh)
    plan.leave(running, 0.7)
    plan.admit(0.7)
    assert decisions.refused == [(late, "target_missed")] and decisions.let_in == [fresh]
    plan.leave(fresh, 1.0)
    assert (one.requests, plan.requests, plan.waiting) == (0, 0, 0)


def test_with_best_effort_a_late_request_goes_behind_those_that_can_meet_their_target() -> None:
    plan, one, decisions = schedule(slo="best_effort", requests=1), client(target=1.0), Decisions()
    running = ticket(one)
    plan.arrive(running)
    hopeless, late = decisions.listen(ticket(one, expected=5.0)), decisions.listen(ticket(one, expected=0.5))
    fresh = decisions.listen(ticket(one, now=0.6, expected=0.1))
    for each in (hopeless, late, fresh):
        plan.arrive(each)
    assert hopeless.best_effort
    assert not late.best_effort
    now, served = 0.7, running
    for expected in (fresh, hopeless, late):
        plan.leave(served, now)
        plan.admit(now)
        assert decisions.let_in[-1] is expected
        served, now = expected, now + 1
    assert late.best_effort and decisions.refused == []


def test_a_queue_that_is_too_slow_for_the_target_leads_to_refusal_on_arrival() -> None:
    plan, one, decisions = schedule(slo="refuse", requests=1, queue_timeout=100.0), client(target=10.0), Decisions()
    now, running = 0.0, ticket(one)
    plan.arrive(running)
    for _ in range(6):  # one leaves the queue every 4 s
        waiting = decisions.listen(ticket(one, now=now, timeout=100.0))
        plan.arrive(waiting)
        now += 4.0
        plan.leave(running, now)
        plan.admit(now)
        running = waiting
    for _ in range(2):
        plan.arrive(ticket(one, now=now, timeout=100.0))
    with refusal(TargetMissed):
        plan.arrive(ticket(one, now=now, timeout=100.0))
    assert plan.waiting == 2
