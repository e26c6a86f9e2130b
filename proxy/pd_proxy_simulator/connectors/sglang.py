"""SGLang's disaggregation: both legs join a room of prefill's bootstrap server, which is at the side port here.

Prefill computes nothing before decode has joined the room; then it samples the first token and pushes it with the KV.
Each leg waits for the other for the length of a lease (`SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT`), and is not notified
when the other fails. An engine's role comes from its flags, not from the request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pd_proxy_simulator.blocks import Content
from pd_proxy_simulator.connectors.engine import ConnectorEngine
from pd_proxy_simulator.connectors.side import Side
from pd_proxy_simulator.errors import RequestError
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.sidechannel import TransferFailed
from pd_proxy_simulator.transfers import Transfer

logger = logging.getLogger(__name__)

_DEFAULT_PORT = 8998  # --disaggregation-bootstrap-port


@dataclass(frozen=True, slots=True)
class _Rendezvous:
    """The rendezvous of a request's prompts with prefill. Host, port and room are each one value for all prompts or
    a list with one for each prompt; a single room is the first of consecutive rooms."""

    hosts: str | list[str] | None
    ports: int | list[int]
    rooms: int | list[int]
    n: int

    def host(self, sequence: Sequence) -> str:
        found = self.hosts[sequence.index // self.n] if isinstance(self.hosts, list) else self.hosts
        return found or ""

    def port(self, sequence: Sequence) -> int:
        return self.ports[sequence.index // self.n] if isinstance(self.ports, list) else self.ports

    def room(self, sequence: Sequence) -> int:
        """A sequence's room. The choices of one prompt share a room, because of a bug in the real engine."""
        prompt = sequence.index // self.n
        return self.rooms[prompt] if isinstance(self.rooms, list) else self.rooms + prompt


def batch_size(body: Mapping[str, Any]) -> int:
    """How many prompts a batch has; 0 for a single prompt."""
    text, ids = body.get("text"), body.get("input_ids")
    if text is not None:
        return len(text) if isinstance(text, list) else 0
    return len(ids) if isinstance(ids, list) and ids and not isinstance(ids[0], int) else 0


def choices(body: Mapping[str, Any]) -> int:
    """How many answers each prompt gets."""
    sampling = body.get("sampling_params")
    first = sampling[0] if isinstance(sampling, list) and sampling else sampling
    n = first.get("n") if isinstance(first, dict) else None
    return n if type(n) is int and n > 0 else 1


def _each(given: Any) -> list[Any]:
    """A value as a list: one value for all prompts, or one for each."""
    return given if isinstance(given, list) else [given]


class SGLang(Side):
    """Prefill and decode servers; an engine in the role `mixed` is one without disaggregation."""

    kept_after = ("length", "stop")

    def __init__(self, engine: ConnectorEngine) -> None:
        super().__init__(engine)
        self._live: dict[int, Sequence] = {}
        self._joined: set[int] = set()  # rooms in which decode waits
        self._bootstrapping: dict[int, asyncio.TimerHandle] = {}
        self._receiving: dict[Sequence, asyncio.Future[list[Content]]] = {}

    def transfer(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Transfer:
        role = self.engine.config.role
        if role == "mixed":
            return Transfer()
        host, port, rooms = (body.get(f"bootstrap_{name}") for name in ("host", "port", "room"))
        if rooms is None:
            message = "Invalid request: Disaggregated request received without bootstrap room id."
            raise RequestError(400, "BadRequest", message)
        if not all(type(room) is int and 0 <= room < 1 << 63 for room in _each(rooms)):
            raise RequestError(400, "Bad Request", "bootstrap_room: Input should be a valid integer", late=False)
        if not all(one is None or isinstance(one, str) for one in _each(host)):
            raise RequestError(400, "Bad Request", "bootstrap_host: Input should be a valid string", late=False)
        if not all(one is None or type(one) is int for one in _each(port)):
            raise RequestError(400, "Bad Request", "bootstrap_port: Input should be a valid integer", late=False)
        if "prompt" not in body and "messages" not in body:
            count = batch_size(body)
            for given in (host, port, rooms):
                if isinstance(given, list) and len(given) != count:
                    raise RequestError(500, "500", "list index out of range")
        n = body.get("n")
        n = n if type(n) is int and n > 0 else choices(body)
        rendezvous = _Rendezvous(host, port or _DEFAULT_PORT, rooms, n)
        return Transfer(role, rendezvous, awaits=role == "prefill")

    def page(self, path: str) -> bytes | None:
        return b"{}" if path == "/health" else None

    def describe(self, path: str) -> dict[str, Any] | None:
        if path not in ("/server_info", "/get_server_info"):
            return None
        role, mode = self.engine.config.role, "null"
        return {
            "model_path": self.engine.config.model,
            "dp_size": 1,
            "disaggregation_mode": mode if role == "mixed" else role,
            "disaggregation_bootstrap_port": self.engine.side_port,
            "internal_states": [{}],
            "version": "0.5.23",
        }

    def error_body(self, error: RequestError) -> dict[str, object]:
        return {
            "object": "error",
            "message": error.message,
            "type": error.kind,
            "param": error.param,
            "code": error.status,
        }

    def submitted(self, sequence: Sequence) -> None:
        room = self._room(sequence)
        if room in self._live:
            self.engine.die(f"KeyError: room {room} is in use")
            return
        self._live[room] = sequence
        if sequence.transfer.keeps:
            sequence.sampling = replace(sequence.sampling, max_tokens=1)
        elif not sequence.transfer.params.host(sequence):
            self.engine.die("AttributeError: a decode request without bootstrap_host")

    def ended(self, sequence: Sequence) -> None:
        room = self._room(sequence)
        if self._live.get(room) is sequence:
            del self._live[room]
            self._joined.discard(room)
            if (timer := self._bootstrapping.pop(room, None)) is not None:
                timer.cancel()

    def load(self, sequence: Sequence) -> None:
        room = self._room(sequence)
        if sequence.transfer.fetches:
            receiving = self._receiving[sequence] = asyncio.ensure_future(self._receive(sequence))
            self.engine.fetch(sequence, self._received(sequence, receiving))
        elif room in self._joined:
            self.engine.admit(sequence)
        else:
            seconds = self.engine.config.lease_seconds
            loop = asyncio.get_running_loop()
            self._bootstrapping[room] = loop.call_later(seconds, self.engine.fail, sequence)

    def stuck(self, sequence: Sequence) -> bool:
        return sequence.transfer.keeps

    # Prefill

    def key(self, sequence: Sequence) -> str:
        return str(self._room(sequence))

    def on_wait(self, name: str) -> None:
        room = int(name)
        self._joined.add(room)
        if (timer := self._bootstrapping.pop(room, None)) is not None:
            timer.cancel()
            self.engine.admit(self._live[room])

    def extra_reply(self, name: str) -> dict[str, Any]:
        sequence = self._live[int(name)]
        return {"first": [sequence.tokens[-1], sequence.draws[-1] if sequence.draws else 0]}

    def kept(self, sequence: Sequence, tokens: int) -> dict[str, Any] | None:
        # The KV has been pushed to the decode engine in the room; the answer has no parameters.
        self.engine.handoffs.done(self.key(sequence), read=True)
        return None

    # Decode

    async def _receive(self, sequence: Sequence) -> list[Content]:
        rendezvous: _Rendezvous = sequence.transfer.params
        engine = self.engine
        cached = sequence.cached // engine.config.block_size
        tokens = sequence.prompt_length - sequence.cached
        host = rendezvous.host(sequence).strip("[]")
        name = str(self._room(sequence))

        def on_answer(answer: Mapping[str, Any]) -> None:
            sequence.given = tuple(answer["first"])

        return await engine.peers.wait(
            host, rendezvous.port(sequence), "", name, cached, tokens, on_answer=on_answer, acknowledge=False
        )

    async def _received(self, sequence: Sequence, receiving: asyncio.Future[list[Content]]) -> list[Content]:
        try:
            return await receiving
        except asyncio.CancelledError:
            if sequence.abandoned:
                raise TransferFailed("aborted") from None
            raise
        finally:
            self._receiving.pop(sequence, None)

    def abandoned(self, sequence: Sequence) -> None:
        if (receiving := self._receiving.get(sequence)) is not None:
            receiving.cancel()

    @staticmethod
    def _room(sequence: Sequence) -> int:
        rendezvous: _Rendezvous = sequence.transfer.params
        return rendezvous.room(sequence)
