"""The P2P tier of vLLM's OffloadingConnector: prefill stores its blocks under a name, and decode fetches them by that
name.

Decode finds blocks by their tokens, so it computes the blocks that it does not receive, whatever the load failure
policy. A decode leg with malformed parameters becomes an ordinary request; the blocks of such a prefill leg cannot be
fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pd_proxy_simulator.connectors.side import Side
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.transfers import Transfer


class OffloadP2P(Side):
    """OffloadingConnector with a P2P tier. The port of a rank is its engine's side port."""

    kept_after = ("length", "stop")
    recomputes = True

    def transfer(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Transfer:
        params = body.get("kv_transfer_params")
        if not isinstance(params, dict):
            return Transfer()
        source, target = params.get("remote_prefiller"), params.get("remote_decoder")
        if isinstance(source, dict) and self._address(source) is not None:
            return Transfer("decode", source)
        if isinstance(target, dict) and target.get("kv_request_id"):
            return Transfer("prefill", target)
        return Transfer()

    def key(self, sequence: Sequence) -> str:
        return str(sequence.transfer.params["kv_request_id"])

    def load(self, sequence: Sequence) -> None:
        address = self._address(sequence.transfer.params)
        assert address is not None
        cached = sequence.cached // self.engine.config.block_size
        tokens = sequence.prompt_length - sequence.cached
        host, port = address
        self.engine.fetch(sequence, self.engine.peers.wait(host, port, "", self.key(sequence), cached, tokens))

    @staticmethod
    def _address(source: Mapping[str, Any]) -> tuple[str, int] | None:
        """The address to fetch from; None where the request does not fetch."""
        host, port, name = (source.get(key) for key in ("remote_host", "remote_port", "kv_request_id"))
        if not (host and port and name) or not str(port).isdigit():
            return None
        return str(host), int(port)
