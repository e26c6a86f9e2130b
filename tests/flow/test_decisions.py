"""How decisions are kept and shown, without a gateway."""

from __future__ import annotations

import json
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.fleet.backend import Backend, Lease, Role
from pd_proxy.fleet.pool_speeds import PoolSpeeds
from pd_proxy.fleet.speeds import join_pool
from pd_proxy.flow.decisions import MOST_CANDIDATES, MOST_HEADER, Decisions, Explanation, explanation_of, header
from pd_proxy.flow.request import Request
from pd_proxy.http.response import AsgiResponse
from pd_proxy.placement.ask import Ask
from pd_proxy.placement.costs import cost
from pd_proxy.placement.decide import Decision, View, decide
from pd_proxy.requests.body import read_body
from pd_proxy.telemetry.records import RequestRecord

AUTO = {"prefill": "auto", "decode": "auto", "mixed": "auto"}
NOW = 1000.0


class Clock:
    """A clock that a test turns by hand."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def pool(role: Role, size: int) -> list[Backend]:
    """Backends that have served for a while and are busy."""
    speeds = PoolSpeeds()
    backends = [Backend(f"http://{role}{number}:8000", role, speeds=join_pool(speeds)) for number in range(size)]
    for number, backend in enumerate(backends):
        for leg in range(10):
            tokens = 500 + 100 * leg
            backend.speeds.given(tokens, leg, tokens)
            backend.speeds.answered(tokens, tokens, tokens, leg + tokens / (10_000 + 500 * number))
            backend.speeds.stepped(0.01 + 0.001 * number, 8, 8000, leg)
        backend.speeds.given(1000 * number, NOW - 0.01, 1000 * number)
        Lease(backend, 700 * number)
    return backends


def request(name: str = "r", **more: Any) -> Request:
    body = read_body(b'{"model":"m","messages":[{"role":"user","content":"x"}]}', "chat")
    made = Request(body, AsgiResponse(None, None), RequestRecord("chat", request_id=name, model="m"), **more)  # type: ignore[arg-type]
    made.record.tries = 1
    return made


def ask(**more: Any) -> Ask:
    return Ask(lambda: 0.0, now=NOW, prompt_tokens=3000, decode_tokens=3512, ttft=1.0, tpot=0.05, **more)


def placed(prefill: int = 3, decode: int = 3, **more: Any) -> tuple[View[Backend], Ask, Decision[Backend]]:
    view = View(
        pool("prefill", prefill), pool("decode", decode), (), {"prefill": prefill, "decode": decode, "mixed": 0}
    )
    asked = ask(**more)
    return view, asked, decide(view, asked, unsplittable="", policies=AUTO, allow_local_prefill=True)


def test_the_costs_of_the_chosen_engines_are_those_of_the_decision() -> None:
    decisions = Decisions(clock=Clock())
    view, asked, decision = placed(cached={"http://prefill1:8000": 1024, "http://decode0:8000": 512})
    assert decision.prefill is not None
    expected = {one.url: cost(one, asked) for one in (decision.prefill, decision.decode)}
    decisions.note(request(), asked, decision)
    for backend in (*view.prefill, *view.decode):  # what comes later changes nothing of it
        Lease(backend, 50_000)
        backend.speeds.given(90_000, NOW, 90_000)
    [shown] = decisions.last(10)
    assert not shown["complete"]
    assert [one["role"] for one in shown["candidates"]] == ["prefill", "decode"]
    for one in shown["candidates"]:
        it = expected[one["url"]]
        assert one["chosen"]
        assert (one["cached"], one["uncached"], one["tokens"], one["requests"]) == (
            *(it.cached, it.uncached, it.tokens, it.requests),
        )
        for name in ("wait", "own", "first_token", "step", "slowness"):
            assert one[name] == pytest.approx(getattr(it, name), rel=1e-2, abs=1e-4), name
    assert (shown["pool"], shown["prefill"], shown["decode"]) == (
        "decode",
        decision.prefill.url,
        decision.decode.url,
    )
    assert shown["reason"] == decision.reason
    assert shown["targets"] == {"ttft": 1.0, "tpot": 0.05}


def test_an_explanation_has_all_candidates_and_the_backends_that_were_left_out() -> None:
    decisions = Decisions(clock=Clock())
    view, asked, decision = placed()
    gone = Backend("http://gone:8000", "decode")
    full = explanation_of(view, asked, [(gone, "down")], _chosen(decision), MOST_CANDIDATES)
    decisions.note(request(), asked, decision, full)
    [shown] = decisions.last(1)
    assert shown["complete"]
    assert len(shown["candidates"]) == 6
    assert sorted(one["url"] for one in shown["candidates"] if one["chosen"]) == sorted(_chosen(decision))
    assert shown["left_out"] == [{"url": "http://gone:8000", "role": "decode", "rule": "down"}]
    assert shown["left_out_by"] == {"down": 1}


def _chosen(decision: Decision[Backend]) -> tuple[str, ...]:
    return tuple(one.url for one in (decision.prefill, decision.decode) if one is not None)


def test_of_a_large_fleet_the_best_candidates_and_the_chosen_one_are_kept() -> None:
    view, asked, _ = placed(40, 40)
    worst = view.decode[-1]
    left = [(Backend(f"http://down{number}:8000", "decode"), "down") for number in range(100)]
    full = explanation_of(view, asked, left, (worst.url,), MOST_CANDIDATES)
    for role in ("prefill", "decode"):
        kept = [one for its, one in full.candidates if its == role]
        assert len(kept) == MOST_CANDIDATES
        every = sorted(cost(one, asked).first_token for one in getattr(view, role))
        best = [one.first_token for one in kept if one.url != worst.url]
        assert sorted(best) == every[: len(best)]
    assert worst.url in {one.url for _, one in full.candidates}
    assert full.of == {"prefill": 40, "decode": 40, "mixed": 0}
    assert len(full.left_out) == 2 * MOST_CANDIDATES
    assert full.rules == {"down": 100}
    whole = explanation_of(view, asked, left, (), None)
    assert (len(whole.candidates), len(whole.left_out)) == (80, 100)


def test_the_last_thousand_are_kept_and_shown_latest_first() -> None:
    decisions = Decisions(most=5, clock=Clock())
    _, asked, decision = placed(1, 1)
    for number in range(12):
        decisions.note(request(f"r{number % 3}"), asked, decision)
    assert len(decisions) == 5
    assert [one["request_id"] for one in decisions.last(10)] == ["r2", "r1", "r0", "r2", "r1"]
    assert [one["request_id"] for one in decisions.last(2)] == ["r2", "r1"]
    assert [one["request_id"] for one in decisions.last(10, "r1")] == ["r1", "r1"]
    assert decisions.last(10, "unknown") == []
    assert decisions.counts["decode", decision.reason] == 12  # all of them are counted


def test_explanations_without_a_request_take_a_small_share_of_the_time() -> None:
    clock = Clock()
    decisions = Decisions(clock=clock)
    spent = 0.0
    for _ in range(20_000):
        if decisions.due(request(), clock.now) if not spent else decisions.due(_PLAIN, clock.now):
            began = clock.now
            clock.now += 0.0002
            spent += 0.0002
            decisions.explained(began)
        clock.now += 0.001
    assert 0.002 < spent / (clock.now - NOW) < 0.0026
    assert decisions.due(request(explain=True), clock.now)  # a request for it always gets one


_PLAIN = request()


def test_the_outcome_of_a_request_stands_beside_the_expected_costs() -> None:
    decisions = Decisions(clock=Clock())
    _, asked, decision = placed()
    made = request()
    decisions.note(made, asked, decision)
    [shown] = decisions.last(1)
    assert shown["outcome"]["outcome"] is None  # it runs
    record = made.record
    record.outcome, record.status, record.prompt_tokens, record.cached_tokens = "ok", 200, 3100, 1000
    record.prefill_seconds = 0.25
    [shown] = decisions.last(1)
    assert shown["outcome"]["outcome"] == "ok"
    assert (shown["outcome"]["prompt_tokens"], shown["outcome"]["cached_tokens"]) == (3100, 1000)
    assert shown["outcome"]["prefill_seconds"] == 0.25
    record.tries = 2  # it was placed again: how it went says nothing of the first try
    assert decisions.last(1)[0]["outcome"] is None


def test_that_no_backend_could_be_chosen_is_a_decision_too() -> None:
    decisions = Decisions(clock=Clock())
    down = Backend("http://decode0:8000", "decode")
    view: View[Backend] = View((), (), (), {"prefill": 0, "decode": 1, "mixed": 0})
    decisions.note_none(request(), ask(), "nothing is up", explanation_of(view, ask(), [(down, "down")], ()))
    [shown] = decisions.last(1)
    assert (shown["error"], shown["pool"], shown["decode"], shown["reason"]) == ("nothing is up", None, None, None)
    assert shown["left_out_by"] == {"down": 1}
    assert decisions.counts == {("none", "none"): 1}


@pytest.mark.parametrize(
    ("reason", "fallback", "counted"),
    [
        ("earliest", "", None),
        ("local_cached", "", ("decode", "local_cached")),
        ("auto", "no_prefill_backend", ("decode", "no_prefill_backend")),
        ("auto", "", None),  # a fleet without pairs
    ],
)
def test_local_prefills_are_counted_by_reason(reason: str, fallback: str, counted: tuple[str, str] | None) -> None:
    decisions = Decisions(clock=Clock())
    _, asked, decision = placed(1, 1)
    prefill = decision.prefill if reason == "earliest" else None
    decisions.note(request(), asked, Decision(decision.decode, "decode", prefill, fallback, reason))
    assert decisions.local == ({counted: 1} if counted else {})
    assert decisions.counts == {("decode", reason): 1}


NAMES = st.text(max_size=300)


@given(
    count=st.integers(0, 120),
    left=st.integers(0, 120),
    name=NAMES,
    error=st.one_of(st.none(), st.text(max_size=6000)),
)
def test_a_header_is_ascii_on_one_line_and_never_too_long(count: int, left: int, name: str, error: str | None) -> None:
    candidates = [
        {"role": "decode", "url": f"http://host{number}:8000", "chosen": number == count - 1, "first_token": 0.1}
        for number in range(count)
    ]
    rest = [{"url": f"http://down{number}:8000", "role": "decode", "rule": "down"} for number in range(left)]
    shown = {"request_id": name, "model": name, "error": error, "candidates": candidates, "left_out": rest}
    value = header(shown)
    assert len(value) <= MOST_HEADER
    assert all(0x20 <= byte < 0x7F for byte in value)
    shown = json.loads(value)
    if error is None and len(name) < 200 and count:
        assert candidates[-1] in shown["candidates"]
        assert count + left - len(shown["candidates"]) - len(shown["left_out"]) == shown.get("omitted", 0)


def test_infinity_is_null_since_json_has_none() -> None:
    decisions = Decisions(clock=Clock())
    view, asked, decision = placed(1, 1)
    view.decode[0].speeds.step_base = inf
    full = explanation_of(view, asked, (), ())
    assert isinstance(full, Explanation)
    decisions.note(request(), asked, decision, full)
    [shown] = decisions.last(1)
    assert [one["step"] for one in shown["candidates"] if one["role"] == "decode"] == [None]
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown


def test_only_a_request_that_is_to_be_explained_gets_the_header() -> None:
    decisions = Decisions(clock=Clock())
    _, asked, decision = placed()
    plain, explained = request("plain"), request("explained", explain=True)
    for one in (plain, explained):
        decisions.note(one, asked, decision)
    assert not any(name == b"x-pd-proxy-decision" for name, _ in plain.headers())
    shown = json.loads(dict(explained.headers())[b"x-pd-proxy-decision"])
    assert shown["decode"] == decision.decode.url
    assert shown["request_id"] == "explained"
