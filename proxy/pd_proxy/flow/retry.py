"""The loop of tries, for every kind of route: try, and try again elsewhere while that is allowed.

A try that failed is followed by another while its error is retryable, `retries.attempts` are left, the retry budget has
a permit, and the request has not ended too many engines (`suspicion.py`). The `Job` runs the tries, and decides what
happens when a try fails that had begun to answer.

The permit comes from the budget of the pool whose backend failed, since its engines are the ones that may be
overloaded; it is taken before the next try is placed, and given back when that try begins to answer or has failed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Protocol

from pd_proxy.errors import BackendError, BackendsKilled
from pd_proxy.fleet.backend import Role
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.retry_budget import Permit, amplifies
from pd_proxy.flow.suspicion import Cuts, Suspicion, warn
from pd_proxy.telemetry.records import RequestRecord

log = logging.getLogger("pd_proxy.flow")

_FIRST_BACKOFF = 0.05  # seconds before a backend that has just failed is tried again
LONGEST_BACKOFF = 1.0


class Job(Protocol):
    """One request, as the loop of tries uses it.

    Attributes:
        cuts: the engines that may have died with the request, or None.
        size: bytes of its body.
        answering: the client has been sent something of the present try.
        failed_pool: the pool of the backend that failed in the last try.
        repeatable: it can be sent once more.
        waits_for_permit: it waits where the retry budget is used up, and each wait counts as a try; otherwise it ends.
    """

    @property
    def record(self) -> RequestRecord: ...
    @property
    def cuts(self) -> Cuts | None: ...
    @property
    def size(self) -> int: ...
    @property
    def answering(self) -> bool: ...
    @property
    def failed_pool(self) -> Role: ...
    @property
    def repeatable(self) -> bool: ...
    @property
    def waits_for_permit(self) -> bool: ...

    def attempt(self, tries: int) -> Awaitable[bool]:
        """Place and run try number `tries`. Returns whether the client has its answer; if not, the same try is run
        again.

        Raises:
            BackendError: the try failed.
        """

    def failed(self, error: BackendError) -> None:
        """A try has failed."""

    async def resume(self, error: BackendError) -> bool:
        """A try failed that had begun to answer. Returns True if the answer is whole all the same, and False if the
        next try is to continue it.

        Raises:
            GatewayError: it cannot be continued.
        """

    def hold(self, permit: Permit) -> None:
        """Keep the permit of the next try until that begins to answer or fails."""

    def note_retry(self, error: BackendError) -> None:
        """Another try follows."""

    def given_up(self, error: BackendError) -> Exception:
        """No try follows: the error that ends the request."""

    def killed(self, error: BackendsKilled) -> None:
        """No try follows, since the request has ended too many engines."""


class Retries:
    """Runs tries.

    Arguments:
        attempts: the most tries of one request.
        suspicion: decides which requests must not go to another engine.
    """

    def __init__(self, attempts: int, fleet: Fleet, suspicion: Suspicion) -> None:
        self.attempts = attempts
        self._fleet = fleet
        self._suspicion = suspicion

    async def run(self, job: Job) -> None:
        """Try until the client has its answer.

        Raises:
            GatewayError: the client has no answer, or only a part of it.
        """
        tries = 0
        while True:
            try:
                if await job.attempt(tries + 1):
                    return
            except BackendError as error:
                tries += 1
                job.failed(error)
                if job.answering:
                    if await job.resume(error):
                        return
                    tries = 0
                    continue
                await self.spare_engines(job, error)
                if not error.retryable or tries >= self.attempts or not job.repeatable:
                    if (end := job.given_up(error)) is error:
                        raise
                    raise end from error
                record, known = job.record, job.record.known_as
                log.info("%s try %d of %d failed: %s", record.request_id, tries, self.attempts, error, extra=known)
                tries = await self._permitted(job, error, tries)
                job.note_retry(error)

    async def spare_engines(self, job: Job, error: BackendError) -> None:
        """Check, after a try that failed with `error`, how many engines the request has ended.

        Raises:
            BackendsKilled: too many engines have ended while they had the request.
        """
        if job.cuts is None or not (ended := await self._suspicion.engines_ended(job.cuts)):
            return
        killed = BackendsKilled(f"{len(ended)} engines ended while they had this request: {', '.join(ended)}")
        job.record.error = str(killed)
        job.killed(killed)
        warn(job.record, job.size, ended)
        raise killed from error

    async def _permitted(self, job: Job, error: BackendError, tries: int) -> int:
        """Take a permit for another try, so that retries never amplify an overload.

        Returns the number of tries so far.

        Raises:
            BackendError: `error`, where no permit is left and the job does not wait, or has no tries left.
        """
        if not amplifies(error):
            return tries
        while (permit := self._fleet.budgets.take(job.failed_pool)) is None:
            tries += 1
            if tries >= self.attempts or not job.waits_for_permit:
                raise error
            await asyncio.sleep(backoff(tries))
        job.hold(permit)
        return tries


def backoff(tries: int) -> float:
    """Seconds before try number `tries`, where it goes to a backend that has just failed."""
    return min(_FIRST_BACKOFF * 2.0 ** (tries - 2), LONGEST_BACKOFF)
