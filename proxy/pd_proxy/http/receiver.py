"""What an exchange with an engine does with its answer."""

from __future__ import annotations

from typing import Protocol

from pd_proxy.errors import BackendError


class Receiver(Protocol):
    """What an exchange does with its answer. Calls come in this order: head, data*, then end or lost, once."""

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        """Status and headers (names in lower case; of repeated ones the last)."""

    def data(self, data: bytes, last: bool) -> None:
        """Body bytes, without the transfer's framing. Never empty. With `last`, `end` follows at once."""

    def end(self) -> None:
        """The answer is whole."""

    def lost(self, error: BackendError) -> None:
        """The answer will not become whole."""
