"""Requests about the engine: probes, operators' commands, and the simulator's own API."""

from __future__ import annotations

from urllib.parse import parse_qs

from pd_proxy_simulator import encoding
from pd_proxy_simulator.engine_process import EngineProcess
from pd_proxy_simulator.errors import RequestError
from pd_proxy_simulator.fault_injection import inject_faults
from pd_proxy_simulator.faults import NOTHING, parse_faults
from pd_proxy_simulator.http import Exchange
from pd_proxy_simulator.page import metrics_page, state


async def operate(sim: EngineProcess, exchange: Exchange) -> None:
    """Answer an operator's request: sleep, pause, reset the prefix cache, profile."""
    sim.operations.append((exchange.path, exchange.query))
    query = {name: values[0] for name, values in parse_qs(exchange.query).items()}
    mode = query.get("mode", "abort")
    match exchange.path:
        case "/is_sleeping" | "/is_paused":  # vLLM 0.32 answers both with true for a paused engine
            exchange.respond(200, encoding.to_json({exchange.path[1:]: sim.asleep or sim.paused}))
            return
        case "/pause":
            sim.paused = True
            await sim.suspend(mode)
            exchange.respond(200, b'{"status":"paused"}')
            return
        case "/resume":
            sim.paused = False
            sim.engine.freeze(False)
            exchange.respond(200, b'{"status":"resumed"}')
            return
        case "/reset_prefix_cache":
            sim.engine.pool.forget()
        case "/sleep":
            sim.asleep = True
            await sim.suspend(mode)
            level = int(query.get("level", "1"))
            exchange.respond(200, encoding.to_json({"status": "sleeping", "level": level}))
            return
        case "/wake_up":
            sim.asleep = False
            sim.engine.freeze(False)
        case "/start_profile":
            sim.profiling = True
        case "/stop_profile":
            sim.profiling = False
    exchange.respond(200, b"", content_type="")


async def answer_probe(sim: EngineProcess, exchange: Exchange, probe: str) -> None:
    """Answer a request for the engine's health, version or metrics; `probe` is its name in `PROBES`."""
    sim.probes[exchange.path] += 1
    injected = sim.faults.draw("health") if probe == "health" else NOTHING
    if await inject_faults(sim, exchange, injected):
        return
    match probe:
        case "live":
            exchange.respond(200, b"", content_type="")
        case "release":
            exchange.respond(200, encoding.to_json({"release": sim.config.version, "api": "1.0.0"}))
        case "health":
            exchange.respond(200 if sim.engine.dead is None else 503, b"", content_type="")
        case "version":
            exchange.respond(200, encoding.to_json({"version": sim.config.version}))
        case "metrics":
            exchange.respond(200, metrics_page(sim.engine).encode(), "text/plain; version=0.0.4; charset=utf-8")


def control(sim: EngineProcess, exchange: Exchange) -> None:
    """Answer a request to the simulator itself: its state and its faults. Raises RequestError."""
    match (exchange.method, exchange.path):
        case ("GET", "/simulator/state"):
            exchange.respond(200, encoding.to_json(state(sim)))
        case ("GET", "/simulator/faults"):
            exchange.respond(200, encoding.to_json({"faults": list(sim.faults)}))
        case ("PUT", "/simulator/faults"):
            try:
                faults = parse_faults(encoding.loads(exchange.body))
            except ValueError as error:
                raise RequestError(400, "BadRequestError", str(error), "faults") from error
            answer = encoding.to_json({"faults": faults})
            exchange.respond(200, answer)
            sim.faults.replace(faults)
        case ("DELETE", "/simulator/faults"):
            sim.faults.clear()
            exchange.respond(200, b'{"faults":[]}')
        case _:
            raise RequestError(404, "Not Found", "Not Found")
