"""One engine's side of a connector: what its requests may ask, what it keeps for decode, how it fetches from prefill.

Each connector is a file here, written from what its engines do on the wire and not from any gateway's code: what would
kill, strand or confuse a real engine does so here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pd_proxy_simulator.errors import RequestError
from pd_proxy_simulator.faults import Leg

if TYPE_CHECKING:
    from pd_proxy_simulator.engine import Engine
    from pd_proxy_simulator.sequences import Sequence


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one request asks of the connector.

    Attributes:
        leg: its leg, as far as the connector can tell.
        params: what it came with; they may be anything.
        awaits: nothing of it is computed before decode has come, though it is prefill's.
    """

    leg: Leg = "local"
    params: Any = None
    awaits: bool = False

    @property
    def fetches(self) -> bool:
        """It wants KV from elsewhere."""
        return self.leg == "decode"

    @property
    def keeps(self) -> bool:
        """Its KV is to be kept for a decode elsewhere."""
        return self.leg == "prefill"


class Side:
    """No connector: every request is the engine's own. The base of all others.

    `kept_after`: the finish reasons after which blocks are kept for decode.
    `recomputes`: what cannot be fetched is computed, whatever the load failure policy.
    """

    kept_after: ClassVar[tuple[str, ...]] = ()
    recomputes: ClassVar[bool] = False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def transfer(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Transfer:
        """What a request asks, before anything of it is judged. Raises RequestError where its handler refuses it."""
        return Transfer()

    def start(self) -> None:
        """The engine has begun, and its ports are known."""

    def told(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a message at the side port that only this connector knows is answered with, if with anything."""
        return None

    def page(self, path: str) -> bytes | None:
        """What the side port answers to a GET of `path`, as JSON; None for 404."""
        return None

    def about(self, path: str) -> dict[str, Any] | None:
        """What the API port answers to a GET of `path`, for engines that tell of themselves; None for 404."""
        return None

    def error_body(self, error: RequestError) -> dict[str, object]:
        """How the API port says an error."""
        return error.body()

    def read(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """A request's body in the words of vLLM's handlers, where the engine has others."""
        return body

    def answer(self, body: dict[str, Any]) -> None:
        """Say in a whole answer what was kept, where the engine says it elsewhere than in `kv_transfer_params`."""

    # Prefill

    def computed(self, sequence: Sequence) -> None:
        """A sequence's prompt is computed, and its blocks are full."""

    def key(self, sequence: Sequence) -> str:
        """The name under which a sequence's blocks are kept."""
        return sequence.request_id

    def kept(self, sequence: Sequence, tokens: int) -> dict[str, Any] | None:
        """The parameters that prefill answers with, once the blocks in `sequence.kept` are kept; `tokens` are in
        them."""
        return None

    def where_kept(self, sequence: Sequence) -> dict[str, Any]:
        """What most of vLLM's connectors answer with alike: whose blocks these are, which, and at which host."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [[block.index for block in sequence.kept]],
            "remote_engine_id": self.engine.id,
            "remote_host": self.engine.config.advertised_host,
        }

    def dropped(self, sequence: Sequence) -> None:
        """A sequence whose blocks were to be kept has ended otherwise."""

    def wanted(self, name: str) -> None:
        """Decode waits for what is to be kept as `name`."""

    def sent_along(self, name: str) -> dict[str, Any]:
        """What decode receives beside the KV that it has waited for."""
        return {}

    # Decode

    def submitted(self, sequence: Sequence) -> None:
        """A sequence that keeps or fetches has been queued."""

    def load(self, sequence: Sequence) -> None:
        """Begin to fetch a sequence's KV into its blocks, or to wait for what it awaits; bad parameters do here what
        they do to a real engine."""
        raise NotImplementedError

    def blocks_to_read(self, sequence: Sequence, named: Any, too_few: str) -> list[int] | None:
        """The numbers of the blocks that are to be read for a sequence.

        Arguments:
            named: what decode was given as `remote_block_ids`; it may be anything.
            too_few: the error of an engine that was named fewer blocks than it needs.

        Returns:
            The last of the first group, as many as are not cached here; None where the engine has died of them.
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
        """The fetch has ended, well or not."""

    def vanished(self, sequence: Sequence) -> None:
        """Its client has gone while it was loading; its blocks stay until the fetch ends."""

    def ended(self, sequence: Sequence) -> None:
        """A sequence has gone, at whatever point of its life."""

    def stuck(self, sequence: Sequence) -> bool:
        """Whether a sequence that is loading waits for what will never come, so that its blocks are its own."""
        return False

    def let_go(self, transfer: Transfer) -> None:
        """A request that was to fetch ends before it did, or was refused: tell prefill, as far as the engine does."""

    async def notify(self, host: str, port: int, name: str) -> None:
        """Tell the engine at `host` that what it keeps as `name` will not be read."""
        if not await self.engine.peers.tell(host, port, {"op": "done", "request_id": name, "read": False}):
            self.engine.stats.failed_notifications += 1


def vllm_transfer(body: Mapping[str, Any]) -> Transfer:
    """What a body asks by the two flags that most of vLLM's connectors share, with its parameters."""
    leg = vllm_leg(body)
    return Transfer(leg, body["kv_transfer_params"] if leg != "local" else None)


def vllm_leg(body: Mapping[str, Any]) -> Leg:
    """Which leg a body is by the two flags that most of vLLM's connectors share."""
    params = body.get("kv_transfer_params")
    if not isinstance(params, dict):
        return "local"
    if params.get("do_remote_decode"):
        return "prefill"
    return "decode" if params.get("do_remote_prefill") else "local"
