"""The interface by which a connector uses the engine that it belongs to."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol

from pd_proxy_simulator.blocks import BlockPool, Content
from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.handoffs import Handoffs
from pd_proxy_simulator.metrics import Stats
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.sidechannel import Peers


class ConnectorEngine(Protocol):
    """The engine that a connector belongs to.

    Attributes:
        id: the engine's id in hand-offs.
        origin: the state before the first token of every prompt.
        side_port: the port where the engine's hand-offs are pulled from.
        http_address: the address of the engine's API.
        dead: why the engine has died; None while it lives.
        pool: the engine's KV blocks.
        handoffs: the blocks that are kept for decode.
        peers: the side channels of other engines.
    """

    config: SimulatorConfig
    id: str
    origin: int
    side_port: int
    http_address: str
    dead: str | None
    stats: Stats
    pool: BlockPool
    handoffs: Handoffs
    peers: Peers

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine for as long as the engine lives."""

    def die(self, reason: str) -> None:
        """Die as after a failed assertion in the core."""

    def fetch(self, sequence: Sequence, contents: Coroutine[Any, Any, list[Content]]) -> None:
        """Fill the blocks of a loading sequence with `contents`; blocks that were cached are not in it."""

    def compute(self, sequence: Sequence) -> None:
        """Compute the prompt of a loading sequence here: there is nothing to fetch."""

    def admit(self, sequence: Sequence) -> None:
        """Compute a sequence: what it waited for has come, or is no longer needed."""

    def fail(self, sequence: Sequence) -> None:
        """Fail a sequence: what it waited for does not come."""
