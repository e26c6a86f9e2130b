"""The cost of `auto` is measured in pairs with `least_loaded`, and prompts differ where they should."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import ClassVar

import pytest

from bench import load, policies
from bench.cases import Case
from bench.cost import counted, engine
from bench.policies import AGAIN, Gateway, Turn
from bench.process import BenchError
from tests.bench.servers import Handler, serving

TURN = Turn({"least_loaded": 200.0, "auto": 206.0, AGAIN: 201.0})


class Reading(Handler):
    """Keeps the prompts, and answers each request with an error."""

    prompts: ClassVar[list[str]]

    def do_POST(self) -> None:
        body = json.loads(self.read_body())
        self.prompts.append(body["messages"][0]["content"])
        self.send_error(503)


@contextmanager
def reading() -> Iterator[tuple[int, list[str]]]:
    class Keeping(Reading):
        prompts: ClassVar[list[str]] = []

    with serving(Keeping) as port:
        yield port, Keeping.prompts


def prompts(program: Path, case: Case) -> list[str]:
    with reading() as (port, found):
        load.drive(program, port, replace(case, concurrency=1, requests=6, prompt_bytes=100), timeout_s=10)
        return list(found)


def test_prompts_are_the_same_by_default(program: Path, small: Case) -> None:
    assert len(set(prompts(program, small))) == 1


def test_prompts_that_differ_from_the_start_share_nothing_with_those_of_another_run(program: Path, small: Case) -> None:
    one, other = (prompts(program, replace(small, differ_at=0, first=first)) for first in (0, 6))
    assert len({prompt[:8] for prompt in one + other}) == 12
    assert {len(prompt) for prompt in one + other} == {100}


def test_prompts_share_as_many_prefixes_as_are_asked_for(program: Path, small: Case) -> None:
    found = prompts(program, replace(small, differ_at=50, prefixes=2))
    assert len(set(found)) == 6
    assert len({prompt[:50] for prompt in found}) == 2
    assert found[0][:50] == found[2][:50]


@pytest.mark.parametrize("differ_at", [4, 95])
def test_numbers_that_do_not_fit_into_a_prompt_are_refused(program: Path, small: Case, differ_at: int) -> None:
    with pytest.raises(BenchError, match=r"--differ-at 4|at byte 95"):
        prompts(program, replace(small, differ_at=differ_at))


def test_an_engine_computes_prompts_one_after_the_other(program: Path, small: Case, tmp_path: Path) -> None:
    case = replace(small, prefill_us=30_000)
    with engine(program, case, tmp_path) as port:
        body = {"prompt": "x", "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
        seconds = seconds_of(port, json.dumps(body), 4)
        assert counted(port)["prefill"] == 4
    assert seconds >= 4 * 0.03


def seconds_of(port: int, body: str, together: int) -> float:
    """How long this many requests take that are sent at the same time."""
    began = time.monotonic()
    connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=5) for _ in range(together)]
    for connection in connections:
        connection.request("POST", "/v1/completions", body)
    for connection in connections:
        assert connection.getresponse().status == 200
        connection.close()
    return time.monotonic() - began


def test_ratios_are_taken_within_a_turn() -> None:
    assert TURN.ratio("auto") == pytest.approx(1.03)
    assert not policies.over_budget([[TURN]])
    assert policies.over_budget([[TURN, Turn({"least_loaded": 200.0, "auto": 220.0})]])


def test_the_interval_holds_the_median_and_is_narrow_where_turns_agree() -> None:
    wide, narrow = policies.spread([[1.0, 1.1, 1.2], [0.9, 1.3]]), policies.spread([[1.04] * 3, [1.04]])
    assert wide.interval[0] <= wide.median == 1.1 <= wide.interval[1]
    assert (narrow.median, narrow.interval, narrow.quartiles) == (1.04, (1.04, 1.04), (1.04, 1.04))


def test_every_pool_has_the_policy_that_is_measured() -> None:
    argv = policies.gateway_argv("least_loaded", 1, [2, 3], [4])
    assert [argv[argv.index(f"--policy.{role}") + 1] for role in ("prefill", "decode", "mixed")] == ["least_loaded"] * 3
    assert argv[-6:] == [
        *("--prefill", "http://127.0.0.1:2", "--prefill", "http://127.0.0.1:3", "--decode", "http://127.0.0.1:4"),
    ]


def test_the_page_has_a_row_for_each_case() -> None:
    page = policies.markdown([policies.row(case, [[TURN, TURN]]) for case in policies.CASES], 1, 2)
    assert page.count("| +3.0%  |") == len(policies.CASES)
    assert "200 µs" in page


def test_processes_are_bound_to_cores_only_within_the_block() -> None:
    before = os.sched_getaffinity(0)
    own, others = policies.split_cores(before)
    with policies.bound(own):
        assert os.sched_getaffinity(0) == own
    assert os.sched_getaffinity(0) == before
    assert own | others == before


def test_a_single_core_is_used_for_the_gateways_and_for_everything_else() -> None:
    assert policies.split_cores({3}) == ({3}, {3})


def test_a_turn_loads_every_gateway_twice_with_other_prompts(
    program: Path, small: Case, tmp_path: Path, engine_port: int
) -> None:
    with engine(program, small, tmp_path) as other_port:
        numbers = count(0, 48)
        gateways = {"a": Gateway(os.getpid(), engine_port), "b": Gateway(os.getpid(), other_port)}
        found = policies.turn(program, gateways, small, numbers)
        assert found.failed == 0
        assert set(found.cpu_us) == {"a", "b"}
        assert [counted(port)["decode"] for port in (engine_port, other_port)] == [96, 96]
        assert next(numbers) == 4 * 48
