"""What admission is told of the backends: whether those that a request would go to have room for it."""

from __future__ import annotations

from proxy.admission.ticket import Ticket
from proxy.fleet.backend import Backend, Lease, Role
from proxy.fleet.fleet import Fleet
from proxy.placement.decide import View, roles_used
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
        return all(
            any(backend.has_room(tokens) for backend in backends) for backends, tokens in self._pools_used(ticket)
        )

    def claim(self, ticket: Ticket) -> Leases:
        """Leases on the least loaded backends that have room."""
        leases = []
        for backends, tokens in self._pools_used(ticket):
            with_room = [backend for backend in backends if backend.has_room(tokens)]
            leases.append(Lease(min(with_room or backends, key=load), tokens))
        return Leases(leases)

    def _pools_used(self, ticket: Ticket) -> list[tuple[list[Backend], int]]:
        candidates: dict[Role, list[Backend]] = {
            role: self._fleet.candidates(role, ticket.model) for role in ("prefill", "decode", "mixed")
        }
        view = View(**candidates, configured=self._fleet.sizes)
        return [
            (candidates[role], ticket.prefill_tokens if role == "prefill" else ticket.tokens)
            for role in roles_used(view, alone=not ticket.split)
        ]
