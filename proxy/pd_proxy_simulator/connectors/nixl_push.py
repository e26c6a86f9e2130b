"""vLLM's NixlPushConnector: decode registers its blocks with prefill, which writes the KV into them once it is
computed.

The two legs are paired by their request ids without the random suffix that each engine appends. Decode waits for a
prefill leg that does not come up to its time limit; here its blocks are free again when the lease ends. (A real engine
of 0.32 keeps them for ever.) A leg that ends before it has registered its blocks does not notify prefill.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pd_proxy_simulator.connectors.side import Side, vllm_transfer
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.transfers import Transfer

_SUFFIX = re.compile(r"-[0-9a-f]{8}$")
_INDEXED = ("remote_engine_id", "remote_host", "remote_port", "tp_size", "remote_request_id")


class NixlPush(Side):
    """NixlPushConnector."""

    kept_after = ("length", "stop")

    def transfer(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Transfer:
        return vllm_transfer(body)

    def key(self, sequence: Sequence) -> str:
        return _SUFFIX.sub("", sequence.request_id)

    def kept(self, sequence: Sequence, tokens: int) -> dict[str, Any]:
        return {
            **self.kept_address(sequence),
            "remote_request_id": sequence.request_id,
            "remote_port": self.engine.side_port,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": tokens,
            "transfer_mode": "push",
        }

    def load(self, sequence: Sequence) -> None:
        params = sequence.transfer.params
        for name in _INDEXED:
            if name not in params:
                self.engine.die(f"KeyError: {name!r} (push_scheduler.py)")
                return
        host, port, engine_id = params["remote_host"], params["remote_port"], params["remote_engine_id"]
        if not (isinstance(host, str) and type(port) is int and isinstance(engine_id, str)):
            self.engine.die(f"TypeError: remote_port {port!r} at {host!r}")
            return
        cached = sequence.cached // self.engine.config.block_size
        tokens = sequence.prompt_length - sequence.cached
        key = self.key(sequence)
        self.engine.fetch(sequence, self.engine.peers.wait(host, port, engine_id, key, cached, tokens))
