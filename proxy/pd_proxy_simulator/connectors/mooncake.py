"""vLLM's MooncakeConnector: decode asks prefill's bootstrap page for the engine's address, and the engine for a
`transfer_id`.

The bootstrap page is at the side port here. Decode waits for a transfer that prefill does not know yet, up to its time
limit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from pd_proxy_simulator.connectors.side import Side, vllm_transfer
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.transfers import Transfer

logger = logging.getLogger(__name__)


class Mooncake(Side):
    """MooncakeConnector.

    `broken_steps`: how many prefill requests were aborted before they had been scheduled, which makes a step of the
    real connector fail.
    """

    kept_after = ("length",)

    broken_steps = 0

    def transfer(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Transfer:
        return vllm_transfer(body)

    def page(self, path: str) -> bytes | None:
        if path != "/query":
            return None
        address = f"tcp://{self.engine.config.advertised_host}:{self.engine.side_port}"
        return json.dumps({"0": {"engine_id": self.engine.id, "worker_addr": {"0": {"0": address}}}}).encode()

    def submitted(self, sequence: Sequence) -> None:
        role, leg = self.engine.config.role, sequence.transfer.leg
        if role not in ("mixed", leg):
            self.engine.die(f"AssertionError: a {leg} request at a {role} engine")

    def key(self, sequence: Sequence) -> str:
        transfer_id = sequence.transfer.params.get("transfer_id")
        if not transfer_id:
            logger.warning("a prefill request without transfer_id: no decode leg can find its blocks")
        return transfer_id if isinstance(transfer_id, str) and transfer_id else sequence.request_id

    def dropped(self, sequence: Sequence) -> None:
        if not sequence.blocks:  # it was never scheduled
            self.broken_steps += 1

    def load(self, sequence: Sequence) -> None:
        address = self._address(sequence.transfer)
        if address is None:
            return
        (host, port), engine_id, transfer_id = address
        cached = sequence.cached // self.engine.config.block_size
        tokens = sequence.prompt_length - sequence.cached
        self.engine.fetch(sequence, self.engine.peers.wait(host, port, engine_id, transfer_id, cached, tokens))

    def stuck(self, sequence: Sequence) -> bool:
        return self._address(sequence.transfer) is None

    def release_unread(self, transfer: Transfer) -> None:
        if (address := self._address(transfer)) is not None:
            (host, port), _, transfer_id = address
            self.engine.spawn(self.notify(host, port, transfer_id))

    @staticmethod
    def _address(transfer: Transfer) -> tuple[tuple[str, int], str, str] | None:
        """Where the KV is: bootstrap address, engine and transfer. None where this is unknown and the request waits
        for ever."""
        params = transfer.params
        address, engine, name = (params.get(k) for k in ("remote_bootstrap_addr", "remote_engine_id", "transfer_id"))
        if not (isinstance(address, str) and isinstance(engine, str) and isinstance(name, str)):
            logger.warning("a decode request without the address of its KV: %s", params)
            return None
        parts = urlsplit(address)
        if parts.scheme != "http" or not parts.hostname or not parts.port:
            logger.warning("invalid bootstrap address: %r", address)
            return None
        return (parts.hostname, parts.port), engine, name
