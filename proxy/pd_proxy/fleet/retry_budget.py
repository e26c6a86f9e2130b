"""Retry budgets, as in Envoy: a pool's retries are bounded by a share of its live requests, so that they never amplify
an overload.

Where engines fail under overload, retries add load. A bound on the tries of each request does not prevent that, since
four tries of every request are four times the load. A bound on the pool's retries in progress does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType

from pd_proxy.errors import BackendCut, BackendError, BackendLost, BackendUnreachable
from pd_proxy.fleet.backend import ROLES, Backend, Role
from pd_proxy.settings.bounds import Retries


class Permit:
    """The permission for one retry. A context manager that releases the permission at its end."""

    __slots__ = ("_budget", "_released", "role")

    def __init__(self, budget: Budgets, role: Role) -> None:
        self._budget = budget
        self._released = False
        self.role = role
        budget.in_progress[role] += 1

    def release(self) -> None:
        """Release the permission. Further calls do nothing."""
        if not self._released:
            self._released = True
            self._budget.in_progress[self.role] -= 1

    def __enter__(self) -> Permit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Budgets:
    """The retry budget of each pool.

    Arguments:
        pool: returns the members of a pool, whose leases are its live requests.
    Attributes:
        in_progress: the number of permits in use, by pool. Changed only by `Permit`.
        refusals: the number of refused permits, by pool.
    """

    def __init__(self, settings: Retries, pool: Callable[[Role], Iterable[Backend]]) -> None:
        self._settings = settings
        self._pool = pool
        self.in_progress: dict[Role, int] = dict.fromkeys(ROLES, 0)
        self.refusals: Counter[str] = Counter()

    def take(self, role: Role) -> Permit | None:
        """Take a permit for a retry on a pool; None where `retries.share` of its live requests, or `retries.floor`, are
        retries already. The caller holds it until the retry begins to answer or has failed."""
        if self.in_progress[role] + 1 <= self.limit(role):
            return Permit(self, role)
        self.refusals[role] += 1
        return None

    def limit(self, role: Role) -> float:
        """The number of retries that a pool may have in progress now."""
        live = sum(backend.inflight_requests for backend in self._pool(role))
        return max(self._settings.floor, self._settings.share * live)


def amplifies(error: BackendError) -> bool:
    """Whether a retry after this failure may amplify an overload, and so needs a permit. The requests of a backend that
    has died or is leaving need none: they replace load that is gone, and may be half of the pool's requests."""
    return not (error.leaves or isinstance(error, BackendUnreachable | BackendLost | BackendCut))
