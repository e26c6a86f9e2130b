"""The receivers of the messages that engines send over ZeroMQ."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from pd_proxy.assembly.connectors import Connectors
from pd_proxy.assembly.placement import Placement
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.zmq.kv_events import KvEvents
from pd_proxy.fleet.zmq.notifications import TransferNotifications
from pd_proxy.fleet.zmq.registrations import Registrations
from pd_proxy.settings.tree import Settings


class EngineMessages(msgspec.Struct, frozen=True):
    """The receivers of engines' messages. Each opens its sockets only where the settings name an address.

    Attributes:
        notices: engines report finished transfers.
        registrations: engines report where they are.
        kv_events: engines report what their KV caches hold; None where no policy needs it.
    """

    notices: TransferNotifications
    registrations: Registrations
    kv_events: KvEvents | None

    def start(self) -> None:
        """Listen, where that has not begun yet. Needs a running event loop.

        Raises:
            CannotListen
        """
        self.notices.start()
        self.registrations.start()
        if self.kv_events is not None:
            self.kv_events.start()

    async def close(self) -> None:
        """Stop listening."""
        self.notices.close()
        self.registrations.close()
        if self.kv_events is not None:
            await self.kv_events.close()


def make_messages(settings: Settings, fleet: Fleet, connectors: Connectors, placement: Placement) -> EngineMessages:
    """Make the receivers. The fleet's metrics show their counts, and KV events correct the prefix index."""
    notices = TransferNotifications(settings.zmq.notices)
    registrations = Registrations(fleet, settings.zmq, connectors.by_name)
    counts: dict[str, Mapping[str, int]] = {"notice": notices.counts, "registration": registrations.counts}
    prompts = placement.prompts
    if placement.placing.looks:
        kv_events = KvEvents(settings, fleet, prompts.index, placement.prefix_key)
        if kv_events.wanted:
            prompts.events = kv_events
            counts |= {"kv_batch": kv_events.batches, "kv_event": kv_events.events}
    fleet.messages = counts
    return EngineMessages(notices, registrations, prompts.events)
