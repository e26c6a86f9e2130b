"""Stored responses over HTTP: started in the background, read again, followed as a stream, cancelled."""

from __future__ import annotations

import time
from functools import partial
from typing import Any
from urllib.parse import parse_qs

from pd_proxy_simulator import encoding
from pd_proxy_simulator.answers import WholeAnswer
from pd_proxy_simulator.background import Recorder
from pd_proxy_simulator.engine_process import EngineProcess
from pd_proxy_simulator.errors import RequestError
from pd_proxy_simulator.faults import InjectedFaults
from pd_proxy_simulator.http import Exchange
from pd_proxy_simulator.named_streams import ResponseStream
from pd_proxy_simulator.requests import GenerationRequest
from pd_proxy_simulator.responses import StoredResponse, outline
from pd_proxy_simulator.sequences import Sequence

_LONG = 86_400.0  # seconds; longer than any test


async def run_in_background(
    sim: EngineProcess,
    exchange: Exchange,
    request: GenerationRequest,
    sequences: list[Sequence],
    injected: InjectedFaults,
    messages: list[Any],
) -> None:
    """Start a response that goes to the store, and answer with its current state, or stream its events."""
    engine = sim.engine
    stored = StoredResponse(outline(request, int(time.time()), "queued", []), messages)
    stored.abort = lambda: engine.abort(sequences)
    sim.responses.keep(stored)
    recorder = Recorder(stored, sim.changed)
    kind = ResponseStream if request.stream else WholeAnswer
    config = sim.adapters.served(request.model)
    answer = kind(recorder, request, injected, config, engine.abort, sim.kill, engine.side)
    answer.expect(sequences)
    engine.submit(sequences)
    if isinstance(answer, ResponseStream):
        answer.start()
        await _replay(sim, exchange, stored, 0)
    else:
        exchange.respond(200, encoding.to_json(stored.body))


async def answer_stored(sim: EngineProcess, exchange: Exchange) -> None:
    """Answer a request for a stored response, or for its cancellation. Raises RequestError."""
    _, _, rest = exchange.path.partition("/v1/responses/")
    response_id, _, action = rest.partition("/")
    stored = sim.responses.find(response_id)
    match (exchange.method, action):
        case ("GET", ""):
            query = parse_qs(exchange.query)
            if query.get("stream", [""])[0] not in ("true", "1"):
                exchange.respond(200, encoding.to_json(stored.body))
                return
            await _replay(sim, exchange, stored, int(query.get("starting_after", ["-1"])[0]) + 1)
        case ("POST", "cancel"):
            exchange.respond(200, encoding.to_json(stored.cancel()))
        case _:
            raise RequestError(404, "Not Found", "Not Found")


async def _replay(sim: EngineProcess, exchange: Exchange, stored: StoredResponse, start: int) -> None:
    """Stream the events of a response from `start` on, as they come.

    The stream of a response that failed never ends: vLLM waits for an event that does not come.
    """
    exchange.start_stream()
    seen = start
    while exchange.open:
        for event in stored.events[seen:]:
            exchange.write(event)
            seen += 1
            if event.startswith(b"event: response.completed"):
                exchange.end_stream()
                return
        await sim.wait_for(partial(_has_more, exchange, stored, seen), _LONG)


def _has_more(exchange: Exchange, stored: StoredResponse, seen: int) -> bool:
    return len(stored.events) > seen or not exchange.open
