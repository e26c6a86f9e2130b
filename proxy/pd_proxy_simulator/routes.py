"""The HTTP surface: which function answers which path, and the requests that the engine computes.

Invariant: every request is answered, cut, or (when a fault says so) left hanging; none is answered twice.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from pd_proxy_simulator import encoding, pooling, speech
from pd_proxy_simulator.answers import StreamAnswer, WholeAnswer
from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.engine_process import EngineProcess, ReceivedRequest
from pd_proxy_simulator.errors import RequestError, engine_dead, internal_error
from pd_proxy_simulator.fault_injection import inject_faults
from pd_proxy_simulator.faults import NOTHING, InjectedFaults
from pd_proxy_simulator.generate import decode_generate, with_handoff_params
from pd_proxy_simulator.http import Exchange
from pd_proxy_simulator.messages import decode_messages
from pd_proxy_simulator.named_streams import MessageStream, ResponseStream
from pd_proxy_simulator.operations import answer_probe, control, operate
from pd_proxy_simulator.paths import (
    BATCH,
    DEVELOPMENT,
    GENERATING,
    PROBES,
    PROFILER,
    RENDER,
    SGLANGS_OWN,
    known_paths,
)
from pd_proxy_simulator.plain import answer_plainly, read_object
from pd_proxy_simulator.requests import GenerationRequest, decode_batch, decode_chat, decode_completion
from pd_proxy_simulator.responses import StoredResponse, decode_response
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.sglang_generate import decode_sglang_generate, refusal
from pd_proxy_simulator.sglang_stream import SGLangStream
from pd_proxy_simulator.stored import answer_stored, run_in_background
from pd_proxy_simulator.tokens import start_state
from pd_proxy_simulator.transfers import Transfer


@dataclass(slots=True)
class Generation:
    """A request that the engine computes, from its head to its answer.

    Attributes:
        transfer: what it asks of the connector.
        injected: the faults that hit it.
        when_gone: called when the client disconnects before the end.
    """

    exchange: Exchange
    received: ReceivedRequest
    transfer: Transfer = field(default_factory=Transfer)
    injected: InjectedFaults = NOTHING
    when_gone: list[Callable[[], None]] = field(default_factory=list)


_STREAMS: dict[str, type[StreamAnswer]] = {
    "messages": MessageStream,
    "responses": ResponseStream,
    "sglang_generate": SGLangStream,
}


class Routes:
    """Answers the requests of one simulator."""

    def __init__(self, sim: EngineProcess) -> None:
        self._sim = sim

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request."""
        try:
            await self._route(exchange)
        except RequestError as error:
            exchange.respond(error.status, encoding.to_json(self._sim.engine.side.error_body(error)))
        except Exception:
            exchange.respond(500, encoding.to_json(internal_error().body()))
            raise
        finally:
            self._sim.changed()

    async def _route(self, exchange: Exchange) -> None:
        path, config = exchange.path, self._sim.config
        if (probe := PROBES[config.surface].get(path)) is not None:
            await answer_probe(self._sim, exchange, probe)
            return
        if path.startswith("/simulator/"):
            control(self._sim, exchange)
            return
        if not self._is_allowed(exchange):
            exchange.respond(401, b'{"error":"Unauthorized"}')
            return
        if exchange.method == "GET" and (about := self._sim.engine.side.describe(path)) is not None:
            exchange.respond(200, encoding.to_json(about))
            return
        known = known_paths(config)
        if path.startswith("/v1/responses/") and path not in RENDER and "/v1/responses" in known:
            await answer_stored(self._sim, exchange)
            return
        if path not in known:
            raise RequestError(404, "Not Found", "Not Found")
        if exchange.method != known[path]:
            raise RequestError(405, "Method Not Allowed", "Method Not Allowed")
        if path in GENERATING or path in (BATCH, SGLANGS_OWN):
            await self._generate(exchange)
        elif path in DEVELOPMENT or path in PROFILER:
            await operate(self._sim, exchange)
        elif not answer_plainly(self._sim, exchange):
            await self._single(exchange)

    def _is_allowed(self, exchange: Exchange) -> bool:
        """Whether a request has the key that its path needs."""
        key = self._sim.config.api_key
        if key is None or not exchange.path.startswith(("/v1", "/inference")):
            return True
        return exchange.headers.get("authorization") == f"Bearer {key}"

    def _received(self, exchange: Exchange) -> ReceivedRequest:
        """Log that a request has arrived."""
        received = ReceivedRequest(exchange.method, exchange.path, exchange.headers, None)
        self._sim.requests.append(received)
        return received

    def _note_end(self, exchange: Exchange, received: ReceivedRequest) -> None:
        received.status = exchange.status
        received.finished = exchange.ended and not received.aborted
        self._sim.served += received.finished

    # Inference without a decode phase, and speech.

    async def _single(self, exchange: Exchange) -> None:
        received = self._received(exchange)

        def gone() -> None:
            received.aborted = True
            self._sim.changed()

        exchange.on_close = gone
        try:
            spoken = exchange.path.startswith("/v1/audio/")
            received.body = body = speech.read_form(exchange) if spoken else read_object(exchange)
            self._sim.changed()
            injected = self._sim.faults.draw("local")
            if await inject_faults(self._sim, exchange, injected):
                return
            if self._sim.engine.dead is not None:
                raise engine_dead()
            if spoken:
                received.output_tokens = await speech.transcribe(exchange, body, injected, self._sim.config)
            else:
                self._pool(exchange, body)
        except RequestError as error:
            exchange.respond(error.status, encoding.to_json(error.body()))
        finally:
            self._note_end(exchange, received)

    def _pool(self, exchange: Exchange, body: Any) -> None:
        config = self._sim.config
        match exchange.path:
            case "/v1/embeddings" | "/pooling":
                answer, kind, headers = pooling.embeddings(body, config)
                exchange.respond(200, answer, kind, headers)
                return
            case "/classify":
                said = pooling.classify(body, config)
            case "/v1/moderations":
                said = pooling.moderate(body, config)
            case "/score" | "/v1/score":
                said = pooling.score(body, config)
            case _:
                said = pooling.rerank(body, config)
        exchange.respond(200, encoding.to_json(said))

    # Inference.

    async def _generate(self, exchange: Exchange) -> None:
        received = self._received(exchange)
        running = Generation(exchange, received)

        def gone() -> None:
            received.aborted = True
            for callback in running.when_gone:
                callback()
            self._sim.changed()

        exchange.on_close = gone
        try:
            await self._run(running)
        except RequestError as error:
            if error.late:
                self._sim.engine.release_unread(running.transfer)
            exchange.respond(error.status, encoding.to_json(self._error_body(exchange.path, error)))
        finally:
            self._note_end(exchange, received)

    def _error_body(self, path: str, error: RequestError) -> dict[str, object]:
        """The body of an error. Errors of the handler of messages have Anthropic's shape; pydantic's errors, which
        are raised before that, have OpenAI's."""
        if error.late and path == "/v1/messages":
            return error.anthropic_body()
        if error.late and path == SGLANGS_OWN and error.status == 400:
            return refusal(error)
        return self._sim.engine.side.error_body(error)

    async def _run(self, running: Generation) -> None:
        """Compute and answer a request, unless a fault or the client ends it first. Raises RequestError."""
        sim, exchange, received = self._sim, running.exchange, running.received
        received.body = body = read_object(exchange)
        asked = with_handoff_params(body) if exchange.path == "/inference/v1/generate" else body
        encoder = sim.config.role == "encode"
        if not encoder:
            running.transfer = sim.engine.side.transfer(asked, exchange.headers)
        received.leg = "encode" if encoder else running.transfer.leg
        sim.changed()
        running.injected = sim.faults.draw(received.leg)
        if await inject_faults(sim, exchange, running.injected, running.transfer):
            return
        if sim.suspended:  # the scheduler is paused: new requests wait
            await sim.wait_for(lambda: not sim.suspended or not exchange.open, 86_400)
        if not exchange.open:
            # The client disconnected before the request was submitted; a decode engine still notifies prefill.
            received.aborted = True
            sim.engine.release_unread(running.transfer)
        elif encoder:
            await self._encode(exchange, body)
        else:
            if exchange.path == "/v1/chat/completions" and running.transfer.leg != "decode":
                body = await sim.engine.media.fetched(body)
            await self._infer(running, body)

    async def _encode(self, exchange: Exchange, body: Any) -> None:
        """Answer an encoder's leg."""
        request = decode_chat(body, exchange.headers, self._sim.config)
        params = await self._sim.engine.media.encode(body)
        answer = encoding.encoded(request.external_id, request.model, len(request.prompts[0]), params)
        exchange.respond(200, encoding.to_json(answer))

    async def _infer(self, running: Generation, body: Any) -> None:
        sim, engine, exchange = self._sim, self._sim.engine, running.exchange
        body = engine.side.read(body)
        config = sim.adapters.served(body.get("model"))
        request, messages = self._decoded(exchange, body, config)
        if engine.dead is not None:
            raise engine_dead()
        draining = sim.draining
        if draining and not _is_ids(body.get("prompt", body.get("token_ids"))):
            # The error of the API server's tokenizer, whose threads accept no more work.
            raise RequestError(500, "InternalServerError", "cannot schedule new futures after shutdown", late=False)
        sequences = self._sequences(request, running.transfer, running.injected)
        keeps = request.kind == "responses" and body.get("store") is not False and config.responses_store
        if keeps and body.get("background"):
            await run_in_background(sim, exchange, request, sequences, running.injected, messages)
            return
        answer = self._begin(running, request, config)
        if answer is None:
            return
        answer.expect(sequences)
        running.when_gone.append(answer.abandon)
        engine.submit(sequences)
        if isinstance(answer, StreamAnswer):
            answer.start()
            running.received.status = exchange.status
        if draining:
            engine.give_up(sequences)
        await answer.done
        running.received.output_tokens = sum(sequence.output_length for sequence in sequences)
        if keeps and (whole := getattr(answer, "body", None)) is not None:
            sim.responses.keep(StoredResponse(whole, messages))

    def _decoded(self, exchange: Exchange, body: Any, config: SimulatorConfig) -> tuple[GenerationRequest, list[Any]]:
        """The request in a body, and what a stored response keeps of its prompt. Raises RequestError."""
        match exchange.path:
            case "/v1/chat/completions":
                return decode_chat(body, exchange.headers, config), []
            case "/v1/chat/completions/batch":
                return decode_batch(body, exchange.headers, config), []
            case "/v1/messages":
                return decode_messages(body, exchange.headers, config), []
            case "/v1/responses":
                return decode_response(body, config, self._sim.responses)
            case "/inference/v1/generate":
                return decode_generate(body, exchange.headers, config), []
            case "/generate":
                return decode_sglang_generate(body, config), []
            case _:
                return decode_completion(body, exchange.headers, config), []

    def _begin(
        self, running: Generation, request: GenerationRequest, config: SimulatorConfig
    ) -> StreamAnswer | WholeAnswer | None:
        """Begin the answer to a request; returns None where a fault has ended it with an error event already.

        Raises:
            RequestError: a fault ends it with an error.
        """
        sim, injected = self._sim, running.injected
        arguments = (running.exchange, request, injected, config, sim.engine.abort, sim.kill, sim.engine.side)
        fails = injected.get("error_event_first") is not None
        if not request.stream:
            if fails:
                raise internal_error()
            return WholeAnswer(*arguments)
        stream = _STREAMS.get(request.kind, StreamAnswer)(*arguments)
        if not fails:
            return stream
        stream.start()
        stream.fail_first(internal_error())
        return None

    def _sequences(self, request: GenerationRequest, transfer: Transfer, injected: InjectedFaults) -> list[Sequence]:
        config = self._sim.adapters.served(request.model)
        recomputed = injected.get("recomputed")
        sequences = []
        for number, prompt in enumerate(request.prompts):
            for child, sampling in enumerate(request.sampling):
                if recomputed is not None:
                    sampling = replace(sampling, recompute_after=recomputed.after_tokens)
                name = request.external_id
                if request.kind == "completion":
                    name = f"{name}-{number}"
                name = f"{name}-{uuid.uuid4().hex[:8]}"
                sequences.append(
                    Sequence(
                        name if request.n == 1 else f"{child}_{name}",
                        number * request.n + child,
                        prompt,
                        sampling,
                        origin=start_state(config.weights),
                        block_size=config.block_size,
                        eos_limit=int(config.eos_rate * (1 << 24)),
                        transfer=transfer,
                        keep_draws=request.logprobs is not None,
                        cache_key=request.cache_key,
                        cache_salt=request.cache_salt,
                        skip_cache=request.prompt_logprobs is not None,
                    )
                )
        return sequences


def _is_ids(prompt: object) -> bool:
    """Whether a prompt is token ids, so that no tokenizer is needed."""
    return isinstance(prompt, list) and all(isinstance(item, int) for item in prompt)
