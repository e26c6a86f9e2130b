"""The HTTP surface: which path does what, and what the faults of a request do to it before the engine sees it.

Invariant: every request is answered, cut, or (when a fault says so) left hanging; none is answered twice.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from pd_proxy_simulator import encoding, pooling, speech
from pd_proxy_simulator.answers import GARBAGE, StreamAnswer, WholeAnswer
from pd_proxy_simulator.background import Recorder
from pd_proxy_simulator.connectors.side import Transfer
from pd_proxy_simulator.errors import RequestError, engine_dead, internal_error, invalid_field
from pd_proxy_simulator.faults import NOTHING, Leg, Mischief, parse_faults
from pd_proxy_simulator.generate import decode_generate, what_is_asked
from pd_proxy_simulator.http import Exchange
from pd_proxy_simulator.messages import decode_messages
from pd_proxy_simulator.named_streams import MessageStream, ResponseStream
from pd_proxy_simulator.page import metrics_page, server_info, state
from pd_proxy_simulator.prompts import completion_prompts, render_chat
from pd_proxy_simulator.requests import GenerationRequest, decode_batch, decode_chat, decode_completion
from pd_proxy_simulator.responses import StoredResponse, decode_response, outline
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.sglang_generate import decode_sglang_generate, refusal
from pd_proxy_simulator.sglang_stream import SGLangStream
from pd_proxy_simulator.tokens import detokenize, start_state, token_text, tokenize

if TYPE_CHECKING:
    from pd_proxy_simulator.server import Simulator

_PROBES = {
    "vllm": {"/health": "health", "/ping": "health", "/metrics": "metrics", "/version": "version"},
    "nim": {
        "/v1/health/live": "live",
        "/v1/health/ready": "health",
        "/v1/metrics": "metrics",
        "/v1/version": "release",
    },
    "openai": {},
}
_GENERATING = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
    "/inference/v1/generate",
}
_BATCH = "/v1/chat/completions/batch"
_RENDER = {f"{path}/render" for path in _GENERATING - {"/inference/v1/generate"}}
_GENERATE = {*_GENERATING, _BATCH, *_RENDER, "/v1/messages/count_tokens"}
_SGLANGS_OWN = "/generate"
_SCORE = {"/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"}
_TASKS = {
    "generate": _GENERATE,
    "embed": {"/v1/embeddings", "/pooling", *_SCORE},
    "classify": {"/classify", "/pooling", *_SCORE},
    "transcribe": {"/v1/audio/transcriptions", "/v1/audio/translations"},
    "moderate": {"/v1/moderations"},
}
_TASKS["any"] = set().union(*_TASKS.values())
_POST = {"/tokenize", "/detokenize", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
_DEVELOPMENT = {
    "/reset_prefix_cache": "POST",
    "/sleep": "POST",
    "/wake_up": "POST",
    "/is_sleeping": "GET",
    "/pause": "POST",
    "/resume": "POST",
    "/is_paused": "GET",
}
_PROFILER = {"/start_profile": "POST", "/stop_profile": "POST"}


@dataclass(slots=True)
class ReceivedRequest:
    """One request as it came in, and what became of it. `status` is None until the status line has gone out."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    leg: Leg = "local"
    status: int | None = None
    aborted: bool = False
    finished: bool = False
    output_tokens: int = 0


def _is_ids(prompt: object) -> bool:
    """Whether a prompt needs no tokenizer."""
    return isinstance(prompt, list) and all(isinstance(item, int) for item in prompt)


_STREAMS: dict[str, type[StreamAnswer]] = {
    "messages": MessageStream,
    "responses": ResponseStream,
    "sglang_generate": SGLangStream,
}


_FREEING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"})
"""Where a request that the handler refuses, as one for an unknown model, has prefill free its blocks."""


class Routes:
    """Answers the requests of one simulator."""

    def __init__(self, sim: Simulator) -> None:
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
        path = exchange.path
        if (probe := _PROBES[self._sim.config.surface].get(path)) is not None:
            self._sim.probes[path] += 1
            await self._probe(exchange, probe)
            return
        if path.startswith("/simulator/"):
            self._control(exchange)
            return
        key = self._sim.config.api_key
        if (
            key is not None
            and path.startswith(("/v1", "/inference"))
            and exchange.headers.get("authorization") != f"Bearer {key}"
        ):
            exchange.respond(401, b'{"error":"Unauthorized"}')
            return
        if exchange.method == "GET" and (about := self._sim.engine.side.about(path)) is not None:
            exchange.respond(200, encoding.to_json(about))
            return
        if path.startswith("/v1/responses/") and path not in _RENDER and "/v1/responses" in self._known():
            await self._stored(exchange)
            return
        known = self._known()
        if path not in known:
            raise RequestError(404, "Not Found", "Not Found")
        if exchange.method != known[path]:
            raise RequestError(405, "Method Not Allowed", "Method Not Allowed")
        match path:
            case _ if path in _GENERATING or path in (_BATCH, _SGLANGS_OWN):
                await self._generate(exchange)
            case _ if path in _RENDER:
                exchange.respond(200, encoding.to_json(self._render(path, self._body(exchange))))
            case "/v1/models":
                exchange.respond(200, encoding.to_json({"object": "list", "data": self._sim.adapters.cards()}))
            case "/tokenize":
                exchange.respond(200, encoding.to_json(self._tokenize(self._body(exchange))))
            case "/detokenize":
                tokens = self._body(exchange).get("tokens") or []
                exchange.respond(200, encoding.to_json({"prompt": detokenize(tokens, special=True)}))
            case "/v1/messages/count_tokens":
                exchange.respond(200, encoding.to_json(self._count(self._body(exchange))))
            case "/v1/load_lora_adapter":
                exchange.respond(200, self._sim.adapters.load(self._body(exchange)).encode(), "text/plain")
            case "/v1/unload_lora_adapter":
                exchange.respond(200, self._sim.adapters.unload(self._body(exchange)).encode(), "text/plain")
            case "/server_info":
                exchange.respond(200, encoding.to_json(server_info(self._sim.config)))
            case _ if path in _DEVELOPMENT or path in _PROFILER:
                await self._operate(exchange)
            case _:
                await self._single(exchange)

    def _known(self) -> dict[str, str]:
        """The paths that there are, and the method of each."""
        config = self._sim.config
        known = dict.fromkeys(_TASKS[config.task] | _POST, "POST") | {"/v1/models": "GET"}
        if config.connector == "sglang":
            known[_SGLANGS_OWN] = "POST"
        if config.surface == "vllm":
            known |= _DEVELOPMENT if config.dev_mode else {}
            if config.dev_mode and config.connector not in ("sglang", "tensorrt_llm"):
                known["/server_info"] = "GET"  # of vLLM; others' sides have pages of that name
            known |= _PROFILER if config.profiler else {}
        return known

    async def _operate(self, exchange: Exchange) -> None:
        """What operators do."""
        sim = self._sim
        sim.operations.append((exchange.path, exchange.query))
        query = {name: values[0] for name, values in parse_qs(exchange.query).items()}
        mode = query.get("mode", "abort")
        match exchange.path:
            case "/is_sleeping" | "/is_paused":  # vLLM 0.32 says both of an engine that is paused
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

    async def _probe(self, exchange: Exchange, probe: str) -> None:
        mischief = self._sim.faults.draw("health") if probe == "health" else NOTHING
        if await self._misbehave(exchange, mischief):
            return
        match probe:
            case "live":
                exchange.respond(200, b"", content_type="")
            case "release":
                exchange.respond(200, encoding.to_json({"release": self._sim.config.version, "api": "1.0.0"}))
            case "health":
                exchange.respond(200 if self._sim.engine.dead is None else 503, b"", content_type="")
            case "version":
                exchange.respond(200, encoding.to_json({"version": self._sim.config.version}))
            case "metrics":
                exchange.respond(
                    200, metrics_page(self._sim.engine).encode(), "text/plain; version=0.0.4; charset=utf-8"
                )

    def _control(self, exchange: Exchange) -> None:
        match (exchange.method, exchange.path):
            case ("GET", "/simulator/state"):
                exchange.respond(200, encoding.to_json(state(self._sim)))
            case ("GET", "/simulator/faults"):
                exchange.respond(200, encoding.to_json({"faults": list(self._sim.faults)}))
            case ("PUT", "/simulator/faults"):
                try:
                    faults = parse_faults(encoding.loads(exchange.body))
                except ValueError as error:
                    raise RequestError(400, "BadRequestError", str(error), "faults") from error
                answer = encoding.to_json({"faults": faults})
                exchange.respond(200, answer)
                self._sim.faults.replace(faults)
            case ("DELETE", "/simulator/faults"):
                self._sim.faults.clear()
                exchange.respond(200, b'{"faults":[]}')
            case _:
                raise RequestError(404, "Not Found", "Not Found")

    def _tokenize(self, body: Any) -> dict[str, Any]:
        if isinstance(body.get("messages"), list):
            generation = body.get("add_generation_prompt") is not False
            tokens = render_chat(body["messages"], body.get("tools"), add_generation_prompt=generation)
        elif isinstance(body.get("prompt"), str):
            tokens = tokenize(body["prompt"])
        else:
            raise invalid_field("prompt", "missing", "Field required", body)
        shown = [token_text(token) for token in tokens] if body.get("return_token_strs") else None
        return {"count": len(tokens), "max_model_len": self._sim.config.context, "tokens": tokens, "token_strs": shown}

    def _render(self, path: str, body: Any) -> Any:
        """…/render: the request with its prompt as token ids, as /inference/v1/generate takes it."""
        pooling.check_model(body, self._sim.config)
        if path == "/v1/completions/render":
            prompts = completion_prompts(body.get("prompt"))
            return [{"token_ids": tokens, "sampling_params": {}} for tokens in prompts]
        prompt = body.get("input") if path == "/v1/responses/render" else body.get("messages")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(messages, list):
            raise invalid_field("messages", "missing", "Field required", body)
        return {"token_ids": render_chat(messages, body.get("tools")), "sampling_params": {}}

    def _count(self, body: Any) -> dict[str, Any]:
        """/v1/messages/count_tokens, as Anthropic's."""
        pooling.check_model(body, self._sim.config)
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise invalid_field("messages", "missing", "Field required", body)
        if system := body.get("system"):
            messages = [{"role": "system", "content": system}, *messages]
        return {"input_tokens": len(render_chat(messages, body.get("tools")))}

    @staticmethod
    def _body(exchange: Exchange) -> Any:
        kind = exchange.headers.get("content-type", "application/json").split(";")[0].strip()
        if kind != "application/json":
            message = "Unsupported Media Type: Only 'application/json' is allowed"
            raise RequestError(415, "Unsupported Media Type", message, late=False)
        try:
            body = encoding.loads(exchange.body)
        except ValueError as error:
            raise invalid_field("0", "json_invalid", "JSON decode error", str(error)) from error
        if not isinstance(body, dict):
            raise invalid_field("", "model_attributes_type", "Input should be a valid dictionary or object", body)
        return body

    # Inference without a decode phase, and speech.

    async def _single(self, exchange: Exchange) -> None:
        received = ReceivedRequest(exchange.method, exchange.path, exchange.headers, None)
        self._sim.requests.append(received)

        def gone() -> None:
            received.aborted = True
            self._sim.changed()

        exchange.on_close = gone
        try:
            spoken = exchange.path.startswith("/v1/audio/")
            received.body = body = speech.read_form(exchange) if spoken else self._body(exchange)
            self._sim.changed()
            mischief = self._sim.faults.draw("local")
            if await self._misbehave(exchange, mischief):
                return
            if self._sim.engine.dead is not None:
                raise engine_dead()
            if spoken:
                received.output_tokens = await speech.transcribe(exchange, body, mischief, self._sim.config)
            else:
                self._pool(exchange, body)
        except RequestError as error:
            exchange.respond(error.status, encoding.to_json(error.body()))
        finally:
            received.status = exchange.status
            received.finished = exchange.ended and not received.aborted
            self._sim.served += received.finished

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
        received = ReceivedRequest(exchange.method, exchange.path, exchange.headers, None)
        self._sim.requests.append(received)
        abandoned: list[Callable[[], None]] = []

        def gone() -> None:
            received.aborted = True
            for callback in abandoned:
                callback()
            self._sim.changed()

        exchange.on_close = gone
        transfer = Transfer()
        try:
            received.body = body = self._body(exchange)
            asked = what_is_asked(body) if exchange.path == "/inference/v1/generate" else body
            encoder = self._sim.config.role == "encode"
            transfer = Transfer() if encoder else self._sim.engine.side.transfer(asked, exchange.headers)
            received.leg = "encode" if encoder else transfer.leg
            self._sim.changed()
            mischief = self._sim.faults.draw(received.leg)
            if await self._misbehave(exchange, mischief, transfer):
                return
            if self._sim.suspended:  # the scheduler is paused: whoever comes waits
                await self._sim.wait_for(lambda: not self._sim.suspended or not exchange.open, 86_400)
            if not exchange.open:
                # The client has gone before the request got anywhere; a decode engine still tells prefill.
                received.aborted = True
                self._sim.engine.let_go(transfer)
                return
            if encoder:
                request = decode_chat(body, exchange.headers, self._sim.config)
                params = await self._sim.engine.media.encode(body)
                answer = encoding.encoded(request.external_id, request.model, len(request.prompts[0]), params)
                exchange.respond(200, encoding.to_json(answer))
                return
            if exchange.path == "/v1/chat/completions" and transfer.leg != "decode":
                body = await self._sim.engine.media.fetched(body)
            await self._infer(exchange, body, transfer, mischief, received, abandoned)
        except RequestError as error:
            if error.late:
                self._sim.engine.let_go(transfer)
            # What the handler of messages refuses has Anthropic's shape, what pydantic refuses before it has OpenAI's.
            if error.late and exchange.path == "/v1/messages":
                body = error.anthropic_body()
            elif error.late and exchange.path == _SGLANGS_OWN and error.status == 400:
                body = refusal(error)
            else:
                body = self._sim.engine.side.error_body(error)
            exchange.respond(error.status, encoding.to_json(body))
        finally:
            received.status = exchange.status
            received.finished = exchange.ended and not received.aborted
            self._sim.served += received.finished

    async def _infer(
        self,
        exchange: Exchange,
        body: Any,
        transfer: Transfer,
        mischief: Mischief,
        received: ReceivedRequest,
        abandoned: list[Callable[[], None]],
    ) -> None:
        messages: list[Any] = []
        body = self._sim.engine.side.read(body)
        config = self._sim.adapters.served(body.get("model"))
        match exchange.path:
            case "/v1/chat/completions":
                request = decode_chat(body, exchange.headers, config)
            case "/v1/chat/completions/batch":
                request = decode_batch(body, exchange.headers, config)
            case "/v1/messages":
                request = decode_messages(body, exchange.headers, config)
            case "/v1/responses":
                request, messages = decode_response(body, config, self._sim.responses)
            case "/inference/v1/generate":
                request = decode_generate(body, exchange.headers, config)
            case "/generate":
                request = decode_sglang_generate(body, config)
            case _:
                request = decode_completion(body, exchange.headers, config)
        if self._sim.engine.dead is not None:
            raise engine_dead()
        draining = self._sim.draining
        if draining and not _is_ids(body.get("prompt", body.get("token_ids"))):
            # Of the API server's tokenizer, whose threads take nothing more.
            raise RequestError(500, "InternalServerError", "cannot schedule new futures after shutdown", late=False)
        sequences = self._sequences(request, transfer, mischief)
        keeps = request.kind == "responses" and body.get("store") is not False and config.responses_store
        if keeps and body.get("background"):
            await self._in_background(exchange, request, sequences, mischief, messages)
            return
        engine = self._sim.engine
        arguments = (exchange, request, mischief, config, engine.abort, self._sim.kill, engine.side)
        first_error = mischief.get("error_event_first")
        if request.stream:
            stream = _STREAMS.get(request.kind, StreamAnswer)(*arguments)
            if first_error is not None:
                stream.start()
                stream.fail_first(internal_error())
                return
            answer: StreamAnswer | WholeAnswer = stream
        else:
            if first_error is not None:
                raise internal_error()
            answer = WholeAnswer(*arguments)
        answer.expect(sequences)
        abandoned.append(answer.abandon)
        self._sim.engine.submit(sequences)
        if isinstance(answer, StreamAnswer):
            answer.start()
            received.status = exchange.status
        if draining:
            engine.give_up(sequences)
        await answer.done
        received.output_tokens = sum(sequence.output_length for sequence in sequences)
        if keeps and (whole := getattr(answer, "body", None)) is not None:
            self._sim.responses.keep(StoredResponse(whole, messages))

    async def _in_background(
        self,
        exchange: Exchange,
        request: GenerationRequest,
        sequences: list[Sequence],
        mischief: Mischief,
        messages: list[Any],
    ) -> None:
        engine = self._sim.engine
        stored = StoredResponse(outline(request, int(time.time()), "queued", []), messages)
        stored.abort = lambda: engine.abort(sequences)
        self._sim.responses.keep(stored)
        recorder = Recorder(stored, self._sim.changed)
        kind = ResponseStream if request.stream else WholeAnswer
        config = self._sim.adapters.served(request.model)
        answer = kind(recorder, request, mischief, config, engine.abort, self._sim.kill, engine.side)
        answer.expect(sequences)
        engine.submit(sequences)
        if isinstance(answer, ResponseStream):
            answer.start()
            await self._replay(exchange, stored, 0)
        else:
            exchange.respond(200, encoding.to_json(stored.body))

    async def _replay(self, exchange: Exchange, stored: StoredResponse, start: int) -> None:
        """The events of a response in the background, from `start`, as they come. One that failed never ends here:
        vLLM waits for an event that does not come."""
        exchange.start_stream()
        while exchange.open:
            for event in stored.events[start:]:
                exchange.write(event)
                start += 1
                if event.startswith(b"event: response.completed"):
                    exchange.end_stream()
                    return
            await self._sim.wait_for(partial(self._has_more, exchange, stored, start), 86_400)

    @staticmethod
    def _has_more(exchange: Exchange, stored: StoredResponse, seen: int) -> bool:
        return len(stored.events) > seen or not exchange.open

    async def _stored(self, exchange: Exchange) -> None:
        """A stored response is asked for, or cancelled."""
        _, _, rest = exchange.path.partition("/v1/responses/")
        response_id, _, action = rest.partition("/")
        stored = self._sim.responses.find(response_id)
        match (exchange.method, action):
            case ("GET", ""):
                query = parse_qs(exchange.query)
                if query.get("stream", [""])[0] not in ("true", "1"):
                    exchange.respond(200, encoding.to_json(stored.body))
                    return
                await self._replay(exchange, stored, int(query.get("starting_after", ["-1"])[0]) + 1)
            case ("POST", "cancel"):
                exchange.respond(200, encoding.to_json(stored.cancel()))
            case _:
                raise RequestError(404, "Not Found", "Not Found")

    def _sequences(self, request: GenerationRequest, transfer: Transfer, mischief: Mischief) -> list[Sequence]:
        config = self._sim.adapters.served(request.model)
        recomputed = mischief.get("recomputed")
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

    async def _misbehave(self, exchange: Exchange, mischief: Mischief, transfer: Transfer | None = None) -> bool:
        """Do what the faults of this request say before the engine sees it; True if it has been dealt with."""
        if not mischief.faults:
            return False
        if mischief.get("engine_death") is not None:
            self._sim.engine.die("the fault engine_death was switched on")
            raise engine_dead()
        if mischief.get("hang") is not None:
            # Never answered; the task ends when the peer or the simulator closes the connection.
            await self._until_closed(exchange)
            return True
        delay = mischief.get("delay_first_byte")
        if delay is not None:
            await asyncio.sleep(delay.delay_s)
        if mischief.get("reset") is not None:
            exchange.cut()
            return True
        status = mischief.get("status")
        if status is not None:
            if (
                status.status == 404 and transfer is not None
            ):  # refused by the handler, which has prefill free its blocks
                self._sim.engine.let_go(transfer)
            self._answer_with_status(exchange, status.status, status.retry_after)
            return True
        garbage = mischief.get("garbage")
        if garbage is not None:
            self._answer_with_garbage(exchange, garbage.form)
            return True
        slow = mischief.get("slow_body")
        if slow is not None:
            exchange.pace(slow.piece_bytes, slow.delay_s)
        return False

    async def _until_closed(self, exchange: Exchange) -> None:
        await self._sim.wait_for(lambda: exchange.connection.exchange is not exchange, 86_400)

    def _answer_with_status(self, exchange: Exchange, status: int, retry_after: int | None) -> None:
        kind, message = {
            404: ("NotFoundError", f"The model `{self._sim.config.model}` does not exist."),
            429: ("RateLimitError", "Too many requests"),
            500: ("InternalServerError", "Internal server error"),
            503: ("ServiceUnavailableError", "Service temporarily unavailable"),
        }.get(status, ("Error", "Simulated error"))
        error = RequestError(status, kind, message)
        headers = None if retry_after is None else {"retry-after": str(retry_after)}
        exchange.respond(status, encoding.to_json(self._sim.engine.side.error_body(error)), headers=headers)

    @staticmethod
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
