"""Answers admission's question whether the backends that a request could use have capacity for it."""

from __future__ import annotations

from collections.abc import Iterator

from pd_proxy.admission.ticket import Ticket
from pd_proxy.fleet.backend import Backend, Lease
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.placement.decide import roles_used
from pd_proxy.placement.policies import load


class Reserved:
    """Capacity that is reserved for an admitted request, until it takes its own leases."""

    __slots__ = ("_leases",)

    def __init__(self, leases: list[Lease]) -> None:
        self._leases = leases

    def release(self) -> None:
        for lease in self._leases:
            lease.release()


class FleetCapacity:
    """The capacity of the fleet, for admission."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def has(self, ticket: Ticket) -> bool:
        """Whether some backend has capacity in each pool that the request would use; where only certain backends may be
        paired, whether some pair has it. True if there is no such pool: the flow then raises the error."""
        has_capacity, model, tokens = self._fleet.has_capacity, ticket.model, ticket.tokens
        decode = has_capacity("decode", model, tokens)
        prefill = has_capacity("prefill", model, ticket.prefill_tokens) if ticket.split else None
        if decode is not None and prefill is not None and self._fleet.pairer(model) is not None:
            if next(self._pairs(ticket, with_capacity=True), None):
                return True
            if next(self._pairs(ticket, with_capacity=False), None):
                return False
            prefill = None
        if decode and prefill:
            return True  # mixed backends are then not needed
        capacities = {"prefill": prefill, "decode": decode, "mixed": has_capacity("mixed", model, tokens)}
        used = roles_used(
            unsplittable=not ticket.split, **{role: capacity is not None for role, capacity in capacities.items()}
        )
        return all(capacities[role] for role in used)

    def reserve(self, ticket: Ticket) -> Reserved:
        """Leases on the least loaded backends that have capacity."""
        candidates, model, tokens = self._fleet.candidates, ticket.model, ticket.tokens
        found = {
            "prefill": candidates("prefill", model, ticket.prefill_tokens),
            "decode": candidates("decode", model, tokens),
            "mixed": candidates("mixed", model, tokens),
        }
        if ticket.split and self._fleet.pairer(model) is not None:
            paired = [*self._pairs(ticket, with_capacity=True)] or [*self._pairs(ticket, with_capacity=False)]
            found["prefill"] = []
            if paired:
                decode = min((decode for _, decode in paired), key=load)
                found["decode"] = [decode]
                found["prefill"] = [prefill for prefill, other in paired if other is decode]
        used = roles_used(unsplittable=not ticket.split, **{role: bool(backends) for role, backends in found.items()})
        return Reserved(
            [Lease(min(found[role], key=load), ticket.prefill_tokens if role == "prefill" else tokens) for role in used]
        )

    def _pairs(self, ticket: Ticket, *, with_capacity: bool) -> Iterator[tuple[Backend, Backend]]:
        """The pairs that the request may use: all of them, or only those that have capacity for it."""
        model, pairs = ticket.model, self._fleet.pairing.pairs
        prefills, decodes = self._fleet.candidates("prefill", model), self._fleet.candidates("decode", model)
        if with_capacity:
            prefills = [prefill for prefill in prefills if prefill.has_capacity(ticket.prefill_tokens)]
            decodes = [decode for decode in decodes if decode.has_capacity(ticket.tokens)]
        return ((p, d) for p in prefills for d in decodes if pairs(p, d, model))
