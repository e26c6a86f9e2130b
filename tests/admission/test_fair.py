"""The order in which waiting requests start."""

from __future__ import annotations

from collections import Counter
from math import inf

from hypothesis import given, settings
from hypothesis import strategies as st
from pd_proxy.admission.clients import Client, Level
from pd_proxy.admission.fair import FairQueue, charge, start_tag
from pd_proxy.admission.ticket import Ticket

from tests.admission.helpers import client, ticket

SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=60)
WEIGHTS = st.floats(0.1, 10)


def drain(queue: FairQueue) -> list[Ticket]:
    found = []
    while (following := queue.first(())) is not None:
        queue.take(following)
        found.append(following)
    return found


def fill(queue: FairQueue, *tickets: Ticket) -> None:
    for each in tickets:
        queue.push(each)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 10**20), st.sampled_from(["m", "n"])), max_size=60))
def test_a_clients_requests_keep_their_order_and_none_is_lost(arrivals: list[tuple[int, int, str]]) -> None:
    level, queue = Level(0), FairQueue()
    clients = [client(str(number), level) for number in range(4)]
    tickets = [ticket(clients[who], tokens, model=model) for who, tokens, model in arrivals]
    fill(queue, *tickets)
    assert queue.count == len(tickets) and queue.size == 100 * len(tickets)
    drained = drain(queue)
    assert sorted(t.number for t in drained) == sorted(t.number for t in tickets)
    for who in clients:
        for model in ("m", "n"):
            numbers = [t.number for t in drained if t.client is who and t.model == model]
            assert numbers == sorted(numbers)
    assert (queue.count, queue.size, queue._models) == (0, 0, {})


@settings(deadline=None)
@given(SIZES, SIZES, WEIGHTS, WEIGHTS)
def test_while_both_wait_two_clients_share_by_weight_within_one_request_each(
    sizes_a: list[int], sizes_b: list[int], weight_a: float, weight_b: float
) -> None:
    level, queue = Level(0), FairQueue()
    a, b = client("a", level, weight=weight_a), client("b", level, weight=weight_b)
    fill(queue, *(ticket(a, size) for size in sizes_a), *(ticket(b, size) for size in sizes_b))
    left = Counter({a: len(sizes_a), b: len(sizes_b)})
    served: Counter[Client] = Counter()
    bound = max(sizes_a) / weight_a + max(sizes_b) / weight_b
    for following in drain(queue):
        served[following.client] += following.tokens
        left[following.client] -= 1
        if not left[a] or not left[b]:
            break
        assert abs(served[a] / weight_a - served[b] / weight_b) <= bound * (1 + 1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(1, 1000)), max_size=40))
def test_a_higher_priority_goes_first_always(arrivals: list[tuple[int, int]]) -> None:
    clients = {priority: client(str(priority), Level(priority)) for priority in range(-2, 3)}
    queue = FairQueue()
    fill(queue, *(ticket(clients[priority], tokens) for priority, tokens in arrivals))
    priorities = [t.client.level.priority for t in drain(queue)]
    assert priorities == sorted(priorities, reverse=True)


def test_idle_clients_do_not_catch_up_and_clients_that_used_free_capacity_are_not_charged() -> None:
    level, queue = Level(0), FairQueue()
    busy, idle = client("busy", level), client("idle", level)
    for _ in range(1000):
        charge(ticket(busy, 100), start_tag(busy))
    fill(queue, *(ticket(busy, 100) for _ in range(10)), *(ticket(idle, 100) for _ in range(10)))
    names = [t.client.name for t in drain(queue)]
    assert Counter(names[:10]) == {"busy": 5, "idle": 5}


def test_a_request_that_leaves_the_queue_is_not_charged_to_its_client() -> None:
    level, queue = Level(0), FairQueue()
    a, b = client("a", level), client("b", level)
    impatient = [ticket(a, 1000) for _ in range(50)]
    fill(queue, *impatient, *(ticket(a) for _ in range(6)), *(ticket(b) for _ in range(6)))
    for each in impatient:
        queue.remove(each)
    assert Counter(t.client.name for t in drain(queue)[:6]) == {"a": 3, "b": 3}


def test_a_clients_queue_that_empties_and_fills_again_keeps_one_place() -> None:
    level, queue = Level(0), FairQueue()
    a, b = client("a", level), client("b", level)
    for _ in range(5):
        fill(queue, ticket(b), again := ticket(a))
        queue.remove(again)
    fill(queue, ticket(a))
    assert len(queue._models["m"]._heap) == 2
    assert sorted(t.client.name for t in drain(queue)) == ["a"] + ["b"] * 5


def test_a_request_with_an_enormous_number_of_tokens_does_not_overflow_the_tags() -> None:
    level = Level(0)
    liar, other = client("liar", level), client("other", level)
    charge(ticket(liar, 10**30), start_tag(liar))
    charge(ticket(liar, 10**30), start_tag(liar))
    assert level.virtual <= 2**20 and start_tag(other) == level.virtual


def test_requests_for_other_models_go_on_while_one_model_is_blocked() -> None:
    queue, one = FairQueue(), client()
    fill(queue, first := ticket(one, model="m"), other := ticket(one, model="n"))
    assert queue.first(()) is first
    assert queue.first({"m"}) is other
    assert queue.first({"m", "n"}) is None


# What a new request may expect


def test_requests_ahead_are_counted_in_the_order_in_which_they_will_start() -> None:
    level, queue = Level(0), FairQueue()
    hog, light, urgent = client("hog", level), client("light", level), client("urgent", Level(1))
    fill(queue, *(ticket(hog, 100) for _ in range(100)))
    assert queue.ahead(ticket(hog, 100)) == 100
    assert queue.ahead(ticket(light, 100)) == 1
    assert queue.ahead(ticket(urgent, 100)) == 0
    fill(queue, *(ticket(light, 100) for _ in range(10)))
    assert queue.ahead(ticket(light, 100)) in (20, 21)
    assert queue.ahead(ticket(client("low", Level(-1)))) == 110


@settings(deadline=None)
@given(SIZES, SIZES, WEIGHTS, st.integers(1, 1000))
def test_the_count_of_requests_ahead_never_exceeds_the_queue(
    sizes_a: list[int], sizes_b: list[int], weight: float, tokens: int
) -> None:
    level, queue = Level(0), FairQueue()
    a, b = client("a", level, weight=weight), client("b", level)
    fill(queue, *(ticket(a, size) for size in sizes_a), *(ticket(b, size) for size in sizes_b))
    assert len(sizes_b) <= queue.ahead(ticket(b, tokens)) <= queue.count


def test_a_new_request_that_would_start_before_the_last_in_turn_displaces_it() -> None:
    level, queue = Level(0), FairQueue()
    hog, light, low = client("hog", level), client("light", level), client("low", Level(-1))
    tickets = [ticket(hog, 100) for _ in range(10)]
    fill(queue, *tickets)
    assert queue.to_displace(ticket(hog, 100)) is None
    assert queue.to_displace(ticket(light, 100)) is tickets[-1]
    assert queue.to_displace(ticket(low, 1)) is None
    fill(queue, lowly := ticket(low, 1))
    assert queue.to_displace(ticket(hog, 100)) is lowly


def urgent(of: Client, due: float, *, best_effort: bool = False) -> Ticket:
    one = ticket(of)
    one.due, one.best_effort = due, best_effort
    return one


def test_of_one_clients_requests_the_one_that_must_start_first_goes_first() -> None:
    one, queue = client(), FairQueue()
    late, soon, hopeless = urgent(one, 9.0), urgent(one, 3.0), urgent(one, 1.0, best_effort=True)
    fill(queue, hopeless, late, soon)
    assert drain(queue) == [soon, late, hopeless]


def test_a_request_with_an_urgent_target_does_not_pass_other_clients_requests() -> None:
    level, queue = Level(0), FairQueue()
    hasty, patient = client("hasty", level), client("patient", level)
    fill(queue, *(urgent(patient, inf) for _ in range(4)), *(urgent(hasty, float(n)) for n in range(4)))
    order = [each.client.name for each in drain(queue)]
    assert order[:4].count("hasty") == 2 and order[:6].count("hasty") == 3


def test_a_best_effort_request_goes_last_of_its_clients_and_keeps_its_clients_share() -> None:
    level, queue = Level(0), FairQueue()
    one, other = client("one", level), client("other", level)
    first, second, third = urgent(one, 1.0), urgent(one, 2.0), urgent(other, inf)
    fill(queue, first, second, third)
    queue.make_best_effort(first)
    assert first.best_effort and queue.count == 3
    assert drain(queue) == [second, third, first]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.booleans(), st.sampled_from("prt")), max_size=40))
def test_the_order_holds_whichever_requests_arrive_leave_or_become_best_effort(
    steps: list[tuple[int, int, bool, str]],
) -> None:
    level, queue = Level(0), FairQueue()
    clients = [client(str(n), level) for n in range(3)]
    waiting: list[Ticket] = []
    for who, due, best_effort, act in steps:
        if act == "p":
            one = urgent(clients[who], float(due), best_effort=best_effort)
            queue.push(one)
            waiting.append(one)
        elif waiting and act == "r":
            queue.remove(waiting.pop(due % len(waiting)))
        elif waiting:
            queue.make_best_effort(waiting[due % len(waiting)])
        assert queue.count == len(waiting) and set(queue) == set(waiting)
        if waiting:
            head = queue.first(())
            mine = [t for t in waiting if head is not None and t.client is head.client]
            assert head is min(mine, key=lambda t: (t.best_effort, t.due, t.number))
    assert set(drain(queue)) == set(waiting)
