"""Readiness: whether requests can be served as the settings say, and what is missing where they cannot."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

from pd_proxy.fleet.backend import ROLES, Backend, Role
from pd_proxy.fleet.findings import MEANING
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.pairing import models_apart

log = logging.getLogger("pd_proxy.fleet")

_TICK = 0.2  # seconds between checks
_SHARE = 0.01  # the most of the event loop's time that checks may take; with hundreds of engines there are many pairs
_START = 1.0  # seconds after the start in which nothing is logged while the fleet is not ready


def not_ready(fleet: Fleet) -> str:
    """Why the fleet cannot serve a request; empty where a group can."""
    lacking = readiness(fleet)
    if not lacking:
        return "no backend is configured"
    if len(lacking) == 1:
        return next(iter(lacking.values()))
    if not all(lacking.values()):
        return ""
    return "; ".join(f"group {name}: {missing}" for name, missing in lacking.items())


def readiness(fleet: Fleet) -> dict[str, str]:
    """What each group with backends lacks to serve requests as the settings say; empty where it lacks nothing."""
    return {name: _missing(fleet, name) for name in fleet.groups if any(b.group == name for b in fleet)}


def _missing(fleet: Fleet, group: str) -> str:
    members = [b for b in fleet if b.group == group]
    up: dict[Role, list[Backend]] = {
        role: [b for b in members if b.role == role and b.up and not b.draining] for role in ROLES
    }
    if up["mixed"]:
        return ""
    if missing := [role for role in ("prefill", "decode") if not up[role]]:
        draining = sum(b.draining for b in members)
        return f"no {' and no '.join(missing)} backend is up" + (f" ({draining} draining)" if draining else "")
    if missing_pair := fleet.pairing.why_none(up["prefill"], up["decode"]):
        return fleet.protocols.lacking(group, up["prefill"] + up["decode"]) or missing_pair
    return _missing_handoff(fleet, up["prefill"], up["decode"])


def _missing_handoff(fleet: Fleet, prefills: list[Backend], decodes: list[Backend]) -> str:
    """Why no hand-off between these backends is known to work; empty where one is. It contains no addresses, since
    everybody who reaches the port may read it."""
    if not fleet.pairs_are_tried:
        return ""
    if fleet.ready_by_fallback and any(decode.connector in fleet.answers_without_handoff for decode in decodes):
        return ""
    proven = [backend for backend in prefills if backend.handed_over]
    readers = [backend for backend in decodes if backend.handed_over]
    if proven and readers and not fleet.pairing.why_none(proven, readers):
        return ""
    why = next((MEANING.get(b.handoff.finding.code, "") for b in (*decodes, *prefills) if b.handoff.finding), "")
    return (
        f"no hand-off between its prefill and decode backends has worked yet ({why or 'one is being tried'}; "
        "/admin/backends says more)"
    )


def models_without_pair(fleet: Fleet, model: str | None) -> str:
    """A text on the models of a group whose prefill and decode backends have none in common, where one of them serves
    `model`; else empty."""
    for name in fleet.groups:
        prefills, decodes = (
            [b for b in fleet.pool(role) if b.group == name and b.up and not b.draining]
            for role in ("prefill", "decode")
        )
        if any(b.serves(model) for b in (*prefills, *decodes)) and (apart := models_apart(prefills, decodes)):
            return apart
    return ""


async def log_readiness(fleet: Fleet) -> None:
    """Log what /ready says whenever that changes, until cancelled."""
    logged: str | None = None
    started = monotonic()
    while True:
        before = monotonic()
        reason = not_ready(fleet)
        now = monotonic()
        if reason != logged and (logged is not None or not reason or now - started > _START):
            if reason:
                log.warning("not ready: %s", reason)
            else:
                log.info("ready: requests can be served")
            logged = reason
        await asyncio.sleep(max(_TICK, (now - before) / _SHARE))
