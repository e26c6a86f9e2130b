"""What admission knows of one client: its bounds, its share, and what it has here.

Invariant: `requests` and `tokens` change only in `enter` and `leave`, which a ticket calls once each.
"""

from __future__ import annotations

from math import ceil, inf

from pd_proxy.errors import RateLimited, TooManyTokens
from pd_proxy.settings.tree import Settings

ANONYMOUS = "anonymous"
"""The one client of a gateway without keys."""

_MEMORY = 16  # requests over which the mean time of a client's requests is taken
SOONEST, LATEST = 1, 60  # seconds; what any Retry-After lies between


class Level:
    """Clients of one priority.

    Attributes:
        virtual: the start tag of the request that was let in last (`fair.py`).
    """

    __slots__ = ("priority", "virtual")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.virtual = 0.0


class Client:
    """One client.

    Arguments:
        most_requests, most_tokens: what it may have here at once, waiting requests included; None: any.
        target: seconds in which its requests are to have their first token; infinite where there is no target.
    Attributes:
        finish: the finish tag of its request that was let in last (`fair.py`).
    """

    __slots__ = (
        "_mean",
        "_seen",
        "finish",
        "level",
        "most_requests",
        "most_tokens",
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
        most_requests: int | None = None,
        most_tokens: int | None = None,
        target: float = inf,
    ) -> None:
        self.name = name
        self.level = level
        self.weight = weight
        self.most_requests = most_requests
        self.most_tokens = most_tokens
        self.target = target
        self.requests = 0
        self.tokens = 0
        self.finish = 0.0
        self._mean = 0.0
        self._seen = 0

    def enter(self, tokens: int) -> None:
        """Count a request in.

        Raises:
            RateLimited: it is one too many for now.
            TooManyTokens: it will always be.
        """
        if self.most_tokens is not None:
            if tokens > self.most_tokens:
                raise TooManyTokens(
                    f"the request counts {tokens} tokens (its prompt's, estimated, and max_tokens); your key allows "
                    f"{self.most_tokens} at once"
                )
            if self.tokens + tokens > self.most_tokens:
                raise RateLimited(
                    f"your key allows {self.most_tokens} tokens at once; {self.tokens} are here, and the request "
                    f"counts {tokens}",
                    retry_after=self.retry_after(),
                )
        if self.most_requests is not None and self.requests >= self.most_requests:
            raise RateLimited(
                f"your key allows {self.most_requests} request(s) at once, and as many are here",
                retry_after=self.retry_after(),
            )
        self.requests += 1
        self.tokens += tokens

    def leave(self, tokens: int, seconds: float | None) -> None:
        """Count a request out.

        Arguments:
            seconds: how long it ran, where it did.
        """
        self.requests -= 1
        self.tokens -= tokens
        if seconds is not None:
            if self._seen < _MEMORY:
                self._seen += 1
            self._mean += (seconds - self._mean) / self._seen

    def retry_after(self) -> int:
        """Seconds until one of its requests should have ended: the mean time of its last ones, divided by how many
        are here."""
        return max(SOONEST, min(LATEST, ceil(self._mean / max(1, self.requests))))


def clients(settings: Settings) -> dict[str, Client]:
    """Every client by its name; the anonymous one where nobody has a key."""
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
                most_requests=client.requests,
                most_tokens=client.tokens,
                target=client.ttft or usual,
            )
            if client
            else Client(name, level, target=usual)
        )
    return found
