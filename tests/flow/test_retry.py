"""The loop of tries: when another follows, and what ends it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from pd_proxy.errors import BackendError, BackendRejected, BackendTimedOut
from pd_proxy.flow.retry import Retries
from pd_proxy.telemetry.records import RequestRecord

ATTEMPTS = 3


class Job:
    """A request whose tries end as given: with an error, with an answer (True), or with none (False)."""

    cuts = None
    failed_pool: Any = "decode"
    size = 0

    def __init__(self, *ends: BackendError | bool, waits: bool = True, repeatable: bool = True) -> None:
        self.record = RequestRecord("chat")
        self.answering = False
        self.repeatable = repeatable
        self.waits_for_permit = waits
        self.tries: list[int] = []
        self.retries = 0
        self.permits: list[Any] = []
        self._ends = list(ends)

    async def attempt(self, tries: int) -> bool:
        self.tries.append(tries)
        end = self._ends.pop(0)
        if isinstance(end, BackendError):
            raise end
        return end

    def failed(self, error: BackendError) -> None: ...

    async def resume(self, error: BackendError) -> bool:
        self.answering = False
        return False

    def hold(self, permit: Any) -> None:
        self.permits.append(permit)

    def note_retry(self, error: BackendError) -> None:
        self.retries += 1

    def given_up(self, error: BackendError) -> Exception:
        return error

    def killed(self, error: Any) -> None: ...


def retries(*permits: str | None) -> Retries:
    """A loop whose budget has these permits, one after the other."""
    left = list(permits)
    budgets = SimpleNamespace(take=lambda pool: left.pop(0))
    return Retries(ATTEMPTS, SimpleNamespace(budgets=budgets), SimpleNamespace())  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses, which take no time here."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return pauses


async def test_a_try_that_fails_is_followed_by_another() -> None:
    job = Job(BackendTimedOut("slow"), True)
    await retries("a permit").run(job)
    assert (job.tries, job.retries, job.permits) == ([1, 2], 1, ["a permit"])


async def test_the_last_error_is_raised_when_all_tries_are_used_up() -> None:
    errors = [BackendTimedOut(str(number)) for number in range(ATTEMPTS)]
    job = Job(*errors)
    with pytest.raises(BackendTimedOut) as raised:
        await retries("one", "two").run(job)
    assert raised.value is errors[-1]
    assert (job.tries, job.retries) == ([1, 2, 3], 2)


@pytest.mark.parametrize(
    "job", [Job(BackendRejected("no", status=400)), Job(BackendTimedOut("slow"), repeatable=False)]
)
async def test_a_failure_that_is_not_retryable_ends_the_request(job: Job) -> None:
    with pytest.raises(BackendError):
        await retries().run(job)
    assert (job.tries, job.retries) == ([1], 0)


async def test_a_try_that_was_none_is_made_again_and_not_counted() -> None:
    job = Job(False, False, True)
    await retries().run(job)
    assert (job.tries, job.retries) == ([1, 1, 1], 0)


async def test_to_wait_for_a_permit_counts_as_a_try(slept: list[float]) -> None:
    job = Job(BackendTimedOut("slow"), True)
    await retries(None, "a permit").run(job)
    assert (job.tries, slept) == ([1, 3], [0.05])


async def test_without_a_permit_it_ends_when_all_tries_are_used_up(slept: list[float]) -> None:
    job = Job(BackendTimedOut("slow"))
    with pytest.raises(BackendTimedOut):
        await retries(None, None).run(job)
    assert (job.tries, slept) == ([1], [0.05])


async def test_a_job_that_does_not_wait_ends_without_a_permit(slept: list[float]) -> None:
    job = Job(BackendTimedOut("slow"), waits=False)
    with pytest.raises(BackendTimedOut):
        await retries(None).run(job)
    assert (job.tries, slept) == ([1], [])


async def test_a_try_that_continues_an_answer_is_the_first_again() -> None:
    job = Job(BackendTimedOut("slow"), True)
    job.answering = True
    await retries().run(job)
    assert (job.tries, job.retries) == ([1, 1], 0)
