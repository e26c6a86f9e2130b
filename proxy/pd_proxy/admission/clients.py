"""The clients as admission sees them: the bounds, the weight and the current requests of each.

Invariant: `requests` and `tokens` change only in `enter` and `leave`, which are called once each for a request.
"""

from __future__ import annotations

from math import ceil, inf

from pd_proxy.errors import RateLimited, TooManyTokens
from pd_proxy.settings.tree import Settings

ANONYMOUS = "anonymous"
"""The name of the only client of a gateway without keys."""

_MEAN_OVER = 16  # requests; the mean duration is exponentially smoothed over about as many
SOONEST, LATEST = 1, 60  # seconds; the bounds of every Retry-After


class Level:
    """What the clients of one priority share.

    Attributes:
        virtual: the virtual time: the start tag of the request that was admitted last (`fair.py`).
    """

    __slots__ = ("priority", "virtual")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.virtual = 0.0


class Client:
    """One client.

    Arguments:
        max_requests, max_tokens: what it may have in the gateway at once, waiting requests included; None: no bound.
        target: the time to first token that its requests are to meet, in seconds; infinite where there is no target.
    Attributes:
        requests, tokens: what it has in the gateway now, waiting requests included.
        finish: the finish tag of its request that was admitted last (`fair.py`).
    """

    __slots__ = (
        "_mean",
        "_seen",
        "finish",
        "level",
        "max_requests",
        "max_tokens",
        "name",
        "requests",
        "target",
        "tokens",
        "weight",
    )

    def __init__(
        self,
        name: str,
        level: Level,
        *,
        weight: float = 1.0,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        target: float = inf,
    ) -> None:
        self.name = name
        self.level = level
        self.weight = weight
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.target = target
        self.requests = 0
        self.tokens = 0
        self.finish = 0.0
        self._mean = 0.0
        self._seen = 0

    def enter(self, tokens: int) -> None:
        """Count a new request.

        Raises:
            RateLimited: the request would exceed a bound now.
            TooManyTokens: the request alone exceeds the bound of tokens.
        """
        if self.max_tokens is not None:
            if tokens > self.max_tokens:
                raise TooManyTokens(
                    f"the request counts {tokens} tokens (its prompt's, estimated, and max_tokens); your key allows "
                    f"{self.max_tokens} at once"
                )
            if self.tokens + tokens > self.max_tokens:
                raise RateLimited(
                    f"your key allows {self.max_tokens} tokens at once; {self.tokens} are here, and the request "
                    f"counts {tokens}",
                    retry_after=self.retry_after(),
                )
        if self.max_requests is not None and self.requests >= self.max_requests:
            raise RateLimited(
                f"your key allows {self.max_requests} request(s) at once, and as many are here",
                retry_after=self.retry_after(),
            )
        self.requests += 1
        self.tokens += tokens

    def leave(self, tokens: int, seconds: float | None) -> None:
        """Stop counting a request, which has ended.

        Arguments:
            seconds: how long it ran; None where it never started.
        """
        self.requests -= 1
        self.tokens -= tokens
        if seconds is not None:
            if self._seen < _MEAN_OVER:
                self._seen += 1
            self._mean += (seconds - self._mean) / self._seen

    def retry_after(self) -> int:
        """Seconds until one of its requests should have ended: the mean duration of its last requests, divided by the
        number of its current ones."""
        return max(SOONEST, min(LATEST, ceil(self._mean / max(1, self.requests))))


def clients(settings: Settings) -> dict[str, Client]:
    """All clients by name; only the anonymous client where no keys are set."""
    levels: dict[int, Level] = {}
    named = {client.name: client for client in settings.clients}
    usual = settings.targets.ttft or inf
    found: dict[str, Client] = {}
    for name in [name for name, _ in settings.client_keys()] or [ANONYMOUS]:
        client = named.get(name)
        priority = client.priority if client else 0
        level = levels.setdefault(priority, Level(priority))
        found[name] = (
            Client(
                name,
                level,
                weight=client.weight,
                max_requests=client.requests,
                max_tokens=client.tokens,
                target=client.ttft or usual,
            )
            if client
            else Client(name, level, target=usual)
        )
    return found
