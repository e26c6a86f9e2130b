"""One engine's side of a connector: the parameters of its requests, what it keeps for decode, and how it fetches from
prefill.

Each connector is one file here. It is written from what its engines do on the wire, not from any gateway's code:
parameters that kill, strand or confuse a real engine have the same effect here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pd_proxy_simulator.connectors.engine import ConnectorEngine
from pd_proxy_simulator.errors import RequestError
from pd_proxy_simulator.faults import Leg
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.transfers import Transfer


class Side:
    """No connector: every request is served by this engine alone. The base class of all others.

    `kept_after`: the finish reasons after which blocks are kept for decode. `recomputes`: whether KV that cannot be
    fetched is computed, whatever the load failure policy.
    """

    kept_after: ClassVar[tuple[str, ...]] = ()
    recomputes: ClassVar[bool] = False

    def __init__(self, engine: ConnectorEngine) -> None:
        self.engine = engine

    def transfer(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Transfer:
        """What a request asks for, before any of it is validated. Raises RequestError where the real handler refuses
        it."""
        return Transfer()

    def start(self) -> None:
        """Called when the engine has started and its ports are known."""

    def on_message(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """The reply to a message at the side port that only this connector knows; None for no reply."""
        return None

    def page(self, path: str) -> bytes | None:
        """The side port's JSON for a GET of `path`; None for 404."""
        return None

    def describe(self, path: str) -> dict[str, Any] | None:
        """The API port's JSON for a GET of `path`, for engines that describe themselves there; None for 404."""
        return None

    def error_body(self, error: RequestError) -> dict[str, object]:
        """The body of an error at the API port."""
        return error.body()

    def read(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Translate a request's body into the fields of vLLM's handlers, where the engine has others."""
        return body

    def answer(self, body: dict[str, Any]) -> None:
        """Add what was kept to a whole answer, where the engine does not use `kv_transfer_params` for it."""

    # Prefill

    def computed(self, sequence: Sequence) -> None:
        """Called when a sequence's prompt is computed and its blocks are full."""

    def key(self, sequence: Sequence) -> str:
        """The name under which a sequence's blocks are kept."""
        return sequence.request_id

    def kept(self, sequence: Sequence, tokens: int) -> dict[str, Any] | None:
        """The parameters that prefill answers with, once the blocks in `sequence.kept` are kept. The blocks hold
        `tokens` tokens."""
        return None

    def kept_address(self, sequence: Sequence) -> dict[str, Any]:
        """The parameters that most of vLLM's connectors share: the engine, the host and the numbers of the blocks."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [[block.index for block in sequence.kept]],
            "remote_engine_id": self.engine.id,
            "remote_host": self.engine.config.advertised_host,
        }

    def dropped(self, sequence: Sequence) -> None:
        """Called when a sequence whose blocks were to be kept has ended otherwise."""

    def on_wait(self, name: str) -> None:
        """Called when decode waits for what is to be kept as `name`."""

    def extra_reply(self, name: str) -> dict[str, Any]:
        """Further values that decode receives with the KV that it has waited for."""
        return {}

    # Decode

    def submitted(self, sequence: Sequence) -> None:
        """Called when a sequence that keeps or fetches has been queued."""

    def load(self, sequence: Sequence) -> None:
        """Begin to fetch a sequence's KV into its blocks, or to wait for decode. Bad parameters have the same effect
        as on a real engine."""
        raise NotImplementedError

    def blocks_to_read(self, sequence: Sequence, named: Any, too_few: str) -> list[int] | None:
        """The numbers of the blocks that are to be read for a sequence.

        Arguments:
            named: what decode received as `remote_block_ids`; its type is not checked.
            too_few: the error of an engine that received fewer block ids than it needs.

        Returns:
            The last ids of the first group, one for each block that is not cached here; None where the engine has died
                of
            them.
        """
        group = named[0] if isinstance(named, list) and named else None
        if not isinstance(group, list) or not all(type(index) is int for index in group):
            self.engine.die(f"TypeError: remote_block_ids {named!r}")
            return None
        missing = len(sequence.blocks) - sequence.cached // self.engine.config.block_size
        if missing > len(group):
            self.engine.die(f"AssertionError: {too_few}")
            return None
        return group[len(group) - missing :]

    def loaded(self, sequence: Sequence) -> None:
        """Called when the fetch has ended, successfully or not."""

    def abandoned(self, sequence: Sequence) -> None:
        """Called when a request ends while its sequence is loading. The blocks stay until the fetch ends."""

    def ended(self, sequence: Sequence) -> None:
        """Called when a sequence has ended, in any state."""

    def stuck(self, sequence: Sequence) -> bool:
        """Whether a sequence that is loading waits for KV that can never come, so that its blocks can be freed."""
        return False

    def release_unread(self, transfer: Transfer) -> None:
        """Notify prefill, where the engine does so, that a request was refused or ended before it fetched its KV."""

    async def notify(self, host: str, port: int, name: str) -> None:
        """Notify the engine at `host` that what it keeps as `name` will not be read."""
        if not await self.engine.peers.notify(host, port, {"op": "done", "request_id": name, "read": False}):
            self.engine.stats.failed_notifications += 1


def vllm_transfer(body: Mapping[str, Any]) -> Transfer:
    """What a body asks for by the two flags that most of vLLM's connectors share, with its parameters."""
    leg = vllm_leg(body)
    return Transfer(leg, body["kv_transfer_params"] if leg != "local" else None)


def vllm_leg(body: Mapping[str, Any]) -> Leg:
    """A body's leg by the two flags that most of vLLM's connectors share."""
    params = body.get("kv_transfer_params")
    if not isinstance(params, dict):
        return "local"
    if params.get("do_remote_decode"):
        return "prefill"
    return "decode" if params.get("do_remote_prefill") else "local"
