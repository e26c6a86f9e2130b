"""Who has which stored response: engines keep what they answered, and only the one that did can be asked for it.

Invariant: no more than `limit` are known; the one that was neither made nor asked for the longest is forgotten first.
A response is its client's own: for others it does not exist.
"""

from __future__ import annotations

from collections import OrderedDict
from sys import intern


class StoredResponses:
    """Ids of stored responses, each with its backend's URL and its client's name."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: OrderedDict[str, tuple[str, str]] = OrderedDict()

    def remember(self, response_id: str, url: str, client: str) -> None:
        """The backend at `url` has answered `client`, and may keep the answer."""
        self._known[response_id] = (intern(url), intern(client))
        if len(self._known) > self._limit:
            self._known.popitem(last=False)

    def holder(self, response_id: str, client: str) -> str:
        """URL of the backend that has a response of `client`'s; empty where none is known to."""
        url, owner = self._known.get(response_id, ("", ""))
        if not url or owner != client:
            return ""
        self._known.move_to_end(response_id)
        return url

    def __len__(self) -> int:
        return len(self._known)
