"""The interface of what receives an engine's answer."""

from __future__ import annotations

from typing import Protocol

from pd_proxy.errors import BackendError


class Receiver(Protocol):
    """Receives one answer. Calls come in this order: `head`, `data` any number of times, `end`. Instead of any of them
    `lost` may come, as the last call."""

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        """The status and the headers: names in lower case, and of repeated headers the last."""

    def data(self, data: bytes, last: bool) -> None:
        """Bytes of the body, without the framing of the transfer; never empty. If `last`, `end` follows at once."""

    def end(self) -> None:
        """The answer is whole."""

    def lost(self, error: BackendError) -> None:
        """The exchange has failed: the answer does not become whole."""
