"""What admission is told of the backends: whether those that a request would go to have room for it."""

from __future__ import annotations

from proxy.admission.ticket import Ticket
from proxy.fleet.backend import Lease
from proxy.fleet.fleet import Fleet
from proxy.placement.decide import roles_used
from proxy.placement.policies import load


class Leases:
    """Room that is kept for a request which has been let in, until it takes leases of its own."""

    __slots__ = ("_leases",)

    def __init__(self, leases: list[Lease]) -> None:
        self._leases = leases

    def release(self) -> None:
        for lease in self._leases:
            lease.release()


class FleetRoom:
    """The backends' bounds, as admission asks about them."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def has(self, ticket: Ticket) -> bool:
        """Whether in each pool that the request would use some backend has room. Also true when there is no such
        pool: the flow will say so."""
        has_room, model, tokens = self._fleet.has_room, ticket.model, ticket.tokens
        decode = has_room("decode", model, tokens)
        prefill = has_room("prefill", model, ticket.prefill_tokens) if ticket.split else None
        if decode and prefill:
            return True  # what mixed backends do does not matter then
        rooms = {"prefill": prefill, "decode": decode, "mixed": has_room("mixed", model, tokens)}
        used = roles_used(alone=not ticket.split, **{role: room is not None for role, room in rooms.items()})
        return all(rooms[role] for role in used)

    def claim(self, ticket: Ticket) -> Leases:
        """Leases on the least loaded backends that have room."""
        candidates, model, tokens = self._fleet.candidates, ticket.model, ticket.tokens
        found = {
            "prefill": candidates("prefill", model, ticket.prefill_tokens),
            "decode": candidates("decode", model, tokens),
            "mixed": candidates("mixed", model, tokens),
        }
        used = roles_used(alone=not ticket.split, **{role: bool(backends) for role, backends in found.items()})
        return Leases(
            [Lease(min(found[role], key=load), ticket.prefill_tokens if role == "prefill" else tokens) for role in used]
        )
