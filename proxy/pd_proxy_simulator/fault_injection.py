"""Carries out the faults that hit a request before the engine sees it.

Invariant: a request that a fault answers, cuts or leaves hanging does not reach the engine.
"""

from __future__ import annotations

import asyncio

from pd_proxy_simulator import encoding
from pd_proxy_simulator.answers import GARBAGE
from pd_proxy_simulator.engine_process import EngineProcess
from pd_proxy_simulator.errors import RequestError, engine_dead, internal_error
from pd_proxy_simulator.faults import InjectedFaults
from pd_proxy_simulator.http import Exchange
from pd_proxy_simulator.transfers import Transfer


async def inject_faults(
    sim: EngineProcess, exchange: Exchange, injected: InjectedFaults, transfer: Transfer | None = None
) -> bool:
    """Carry out a request's faults before the engine sees it; returns whether the request has been answered.

    Raises:
        RequestError: the fault ends the engine.
    """
    if not injected.faults:
        return False
    if injected.get("engine_death") is not None:
        sim.engine.die("the fault engine_death was switched on")
        raise engine_dead()
    if injected.get("hang") is not None:
        # The request is never answered; the task ends when the peer or the simulator closes the connection.
        await _until_closed(sim, exchange)
        return True
    delay = injected.get("delay_first_byte")
    if delay is not None:
        await asyncio.sleep(delay.delay_s)
    if injected.get("reset") is not None:
        exchange.cut()
        return True
    status = injected.get("status")
    if status is not None:
        # A 404 is the handler's refusal, after which prefill frees its blocks.
        if status.status == 404 and transfer is not None:
            sim.engine.release_unread(transfer)
        _answer_with_status(sim, exchange, status.status, status.retry_after)
        return True
    garbage = injected.get("garbage")
    if garbage is not None:
        _answer_with_garbage(exchange, garbage.form)
        return True
    slow = injected.get("slow_body")
    if slow is not None:
        exchange.pace(slow.piece_bytes, slow.delay_s)
    return False


async def _until_closed(sim: EngineProcess, exchange: Exchange) -> None:
    await sim.wait_for(lambda: exchange.connection.exchange is not exchange, 86_400)


def _answer_with_status(sim: EngineProcess, exchange: Exchange, status: int, retry_after: int | None) -> None:
    kind, message = {
        404: ("NotFoundError", f"The model `{sim.config.model}` does not exist."),
        429: ("RateLimitError", "Too many requests"),
        500: ("InternalServerError", "Internal server error"),
        503: ("ServiceUnavailableError", "Service temporarily unavailable"),
    }.get(status, ("Error", "Simulated error"))
    error = RequestError(status, kind, message)
    headers = None if retry_after is None else {"retry-after": str(retry_after)}
    exchange.respond(status, encoding.to_json(sim.engine.side.error_body(error)), headers=headers)


def _answer_with_garbage(exchange: Exchange, form: str) -> None:
    match form:
        case "bytes":
            exchange.raw(GARBAGE)
            exchange.cut(polite=True)
        case "json":
            exchange.respond(200, b'{"id": "cmpl-1", "choices": [{"index": 0, "te')
        case "error":
            exchange.respond(200, encoding.to_json(internal_error().body()))
        case "empty":
            exchange.respond(200, b"")
        case _:
            exchange.keep_alive = False
            exchange.respond(200, b'{"id": "cmpl-1", "object": "text_', length=4096)
