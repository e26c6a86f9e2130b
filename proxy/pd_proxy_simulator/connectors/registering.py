"""Engines that register: each sends the gateway its role and addresses every few seconds."""

from __future__ import annotations

import asyncio
from typing import Any

from pd_proxy_simulator.connectors.messages import send, sender
from pd_proxy_simulator.connectors.side import Side


class Registering(Side):
    """What the connectors have in common whose engines register."""

    def start(self) -> None:
        if self.engine.config.proxy:
            self.engine.spawn(self._register())

    async def _register(self) -> None:
        engine = self.engine
        with sender("DEALER", engine.config.proxy) as socket:
            while True:
                send(socket, self.registration())
                await asyncio.sleep(engine.config.register_every)

    def registration(self) -> dict[str, Any]:
        """The message with which the engine registers."""
        config = self.engine.config
        return {
            "type": "P" if config.role == "prefill" else "D",
            "http_address": self.engine.http_address,
            "zmq_address": f"{config.advertised_host}:{self.engine.side_port}",
        }
