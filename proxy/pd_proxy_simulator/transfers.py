"""What one request asks of its engine's connector. Sequences hold it, and each connector makes its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pd_proxy_simulator.faults import Leg


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one request asks of the connector.

    Attributes:
        leg: the request's leg, as far as the connector can tell.
        params: the request's parameters, as they came; their types are not checked.
        awaits: whether a prefill leg is computed only after decode has come.
    """

    leg: Leg = "local"
    params: Any = None
    awaits: bool = False

    @property
    def fetches(self) -> bool:
        """Whether the request wants KV from elsewhere."""
        return self.leg == "decode"

    @property
    def keeps(self) -> bool:
        """Whether the request's KV is to be kept for a decode engine elsewhere."""
        return self.leg == "prefill"
