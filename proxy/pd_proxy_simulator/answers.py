"""Turns the engine's tokens into the client's answer: one whole body, or a stream of chunks.

Both kinds are listeners of the engine and are called inside its step, so nothing here awaits: no task, no queue, one
write for each token. If the client reads too slowly, tokens gather and go out together, as in vLLM's output collector.

Invariant: `done` is set exactly once: the answer is complete, has failed, was cut, or its client has disconnected.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

from pd_proxy_simulator import encoding, generate, messages, responses, sglang_generate
from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.connectors.side import Side
from pd_proxy_simulator.errors import RequestError, internal_error
from pd_proxy_simulator.faults import Fault, InjectedFaults
from pd_proxy_simulator.http import Exchange
from pd_proxy_simulator.requests import GenerationRequest, Kind
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.tokens import detokenize

Object = dict[str, Any]
Abort = Callable[[list[Sequence]], None]

GARBAGE = b"\x15\x03\x03\x00\x02\x02\x28 this is not HTTP\r\n" + random.Random(0).randbytes(64)


class Answer:
    """What whole and streamed answers have in common."""

    def __init__(
        self,
        exchange: Exchange,
        request: GenerationRequest,
        injected: InjectedFaults,
        config: SimulatorConfig,
        abort: Abort,
        kill: Callable[[], None],
        side: Side,
    ) -> None:
        self.exchange = exchange
        self.request = request
        self.injected = injected
        self.config = config
        self.created = int(time.time())
        self.sequences: list[Sequence] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.aborted = False
        self.tokens_seen = 0
        self._abort = abort
        self._kill = kill
        self._side = side
        self._unfinished = 0
        self._death = injected.get("die_mid_stream")
        self._stall = injected.get("stall_mid_stream")

    def expect(self, sequences: list[Sequence]) -> None:
        """Become the listener of these sequences."""
        self.sequences = sequences
        self._unfinished = len(sequences)
        for sequence in sequences:
            sequence.listener = self

    def on_token(self, sequence: Sequence, token: int | None, text: str) -> None:
        """Handle one token of a sequence."""
        raise NotImplementedError

    def on_failure(self, sequence: Sequence, error: RequestError) -> None:
        """Handle the failure of a sequence."""
        raise NotImplementedError

    def abandon(self) -> None:
        """End the answer because the client has disconnected."""
        if not self.done.done():
            self.aborted = True
            self.done.set_result(None)
        self._abort(self.sequences)

    def finish(self) -> None:
        """End the answer: it is complete, or never will be."""
        if not self.done.done():
            self.done.set_result(None)

    def dies_now(self) -> bool:
        """Break the answer off if a fault says so after this many tokens; returns whether it was broken off."""
        death = self._death
        if death is None or death.after_tokens < 0 or self.tokens_seen < death.after_tokens or self.done.done():
            return False
        self._die(death)
        return True

    def _die(self, death: Fault) -> None:
        if death.ending == "kill":
            self._kill()
        else:
            self._break_off(death)
        self.finish()
        self._abort(self.sequences)

    def _break_off(self, death: Fault) -> None:
        """Write what the fault still lets out, and end the connection."""
        self.exchange.cut(polite=death.ending != "reset")

    def finished(self, texts: list[str], handoff: Object | None) -> encoding.Finished:
        """The values from which the body is made, once every sequence has ended."""
        config = self.config
        return encoding.Finished(
            request=self.request,
            sequences=self.sequences,
            texts=texts,
            created=self.created,
            details=config.prompt_tokens_details,
            weights=config.weights,
            handoff=handoff,
        )

    @property
    def handoff(self) -> Object | None:
        """The parameters that a prefill leg answers with: those of the first prompt's last choice."""
        if self.injected.get("drop_handoff_params") is not None:
            return None
        found = [sequence.handoff_params for sequence in self.sequences[: self.request.n]]
        return next((params for params in reversed(found) if params is not None), None)


BODIES: dict[Kind, Callable[[encoding.Finished], Any]] = {
    "chat": encoding.chat_body,
    "completion": encoding.completion_body,
    "messages": messages.message_body,
    "responses": responses.response_body,
    "generate": generate.generate_body,
    "sglang_generate": sglang_generate.sglang_generate_body,
}


class WholeAnswer(Answer):
    """Answers with one JSON body when every sequence has ended."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.body: Object | None = None  # what was answered
        self._texts: dict[int, list[str]] = {}

    def on_token(self, sequence: Sequence, token: int | None, text: str) -> None:
        """Keep the text; answer after the last token."""
        if self.done.done():
            return
        self.tokens_seen += token is not None
        self._texts.setdefault(sequence.index, []).append(text)
        if self.dies_now():
            return
        if sequence.finish_reason is not None:
            self._unfinished -= 1
            if not self._unfinished:
                self._respond()

    def on_failure(self, sequence: Sequence, error: RequestError) -> None:
        """Answer with the error, and abort the other sequences."""
        if self.done.done():
            return
        if self.request.kind == "messages":
            body = error.anthropic_body()
        elif self.request.kind == "sglang_generate" and error.status == 400:
            body = sglang_generate.refusal(error)
        else:
            body = self._side.error_body(error)
        self.exchange.respond(error.status, encoding.to_json(body))
        self.finish()
        self._abort(self.sequences)

    def _respond(self) -> None:
        late = self._death is not None and self._death.after_tokens < 0
        if self._stall is not None and self._stall.after_tokens >= 0:
            return
        try:
            texts = ["".join(self._texts.get(sequence.index, ())) for sequence in self.sequences]
            body = BODIES[self.request.kind](self.finished(texts, self.handoff))
        except RequestError as error:
            self.on_failure(self.sequences[0], error)
            return
        self._side.answer(body)
        self.body = body
        data = encoding.to_json(body)
        if not late and self._stall is None:
            self.exchange.respond(200, data)
            self.finish()
            return
        self.exchange.respond_in_part(200, data[: len(data) // 2], len(data))
        if self._death is not None and late:
            if self._death.ending == "garbage":
                self.exchange.raw((GARBAGE * len(data))[: len(data) - len(data) // 2])
            self._die(self._death)


class StreamAnswer(Answer):
    """Answers with server-sent events, one for each token."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._head = encoding.head(self.request, self.created)
        self._greeted: set[int] = set()
        self._backlog: dict[Sequence, tuple[list[int], list[str]]] = {}
        self._offsets: dict[int, int] = {}  # characters of log probabilities sent so far
        self._calls: dict[int, CallStream] = {}
        self._handed_out: dict[int, int] = {}
        self._stalled = False

    def start(self) -> None:
        """Send the status line, before the engine has generated anything."""
        self.exchange.start_stream()
        self.exchange.on_writable = self._send_backlog
        if any(fault is not None and fault.after_tokens == 0 for fault in (self._death, self._stall)):
            for sequence in self.sequences[:1]:
                self._send_opening(sequence)
        self._stalled = self._stall is not None and self._stall.after_tokens == 0
        self.dies_now()

    def on_token(self, sequence: Sequence, token: int | None, text: str) -> None:
        """Send one chunk, unless the client reads too slowly."""
        if self.done.done() or self._stalled:
            return
        tokens = [] if token is None else [token]
        if self._backlog or not self.exchange.writable:
            waiting = self._backlog.setdefault(sequence, ([], []))
            waiting[0].extend(tokens)
            waiting[1].append(text)
            return
        self._send_tokens(sequence, tokens, text)

    def on_failure(self, sequence: Sequence, error: RequestError) -> None:
        """Send an error event under status 200. A chat's role chunk has been sent before it."""
        if self.done.done():
            return
        if error.is_output:
            self._send_opening(sequence)
        self._fail(error)
        self._abort(self.sequences)

    def fail_first(self, error: RequestError) -> None:
        """Carry out the fault `error_event_first`: an error event before any token."""
        if self.request.kind == "chat":
            self._choice({"index": 0, "delta": {"role": "assistant", "content": ""}, **_ROLE_REST})
        self._fail(error)

    def _break_off(self, death: Fault) -> None:
        exchange = self.exchange
        match death.ending:
            case "truncated":
                exchange.raw(b"%x\r\n" % 256 + self._head)
            case "garbage":
                exchange.raw(GARBAGE)
            case "json":
                exchange.write(self._head + b'{"index": 0, "te\n\n')
            case "error":
                exchange.write(encoding.event(internal_error().body()))
        if death.ending in ("json", "error", "done"):
            exchange.write(encoding.DONE)
        if death.ending in ("json", "error", "done", "end"):
            exchange.end_stream()
        else:
            super()._break_off(death)

    def _fail(self, error: RequestError) -> None:
        self.exchange.write(encoding.event(error.body()))
        self.exchange.write(encoding.DONE)
        self.exchange.end_stream()
        self.finish()

    def _send_backlog(self) -> None:
        backlog, self._backlog = self._backlog, {}
        for sequence, (tokens, texts) in backlog.items():
            if self.done.done() or self._stalled:
                return
            self._send_tokens(sequence, tokens, "".join(texts))

    def _send_tokens(self, sequence: Sequence, tokens: list[int], text: str) -> None:
        self._send_opening(sequence)
        handed = self._handed_out.get(sequence.index, 0)
        self._handed_out[sequence.index] = handed + len(tokens)
        draws = [] if sequence.draws is None else sequence.draws[handed : handed + len(tokens)]
        self._send_delta(sequence, tokens, draws, text)
        self.tokens_seen += len(tokens)
        if self.dies_now():
            return
        if self._stall is not None and 0 <= self._stall.after_tokens <= self.tokens_seen:
            self._stalled = True
            return
        # A backlog can hold tokens that came before the sequence ended.
        if sequence.finish_reason is not None and self._handed_out[sequence.index] == sequence.output_length:
            self._unfinished -= 1
            if not self._unfinished:
                self._end()

    def _send_delta(self, sequence: Sequence, tokens: list[int], draws: list[int], text: str) -> None:
        if self.request.kind == "chat":
            self._send_chat_delta(sequence, tokens, draws, text)
        elif self.request.kind == "generate":
            first = sequence.index not in self._greeted
            self._greeted.add(sequence.index)
            prompt = self.request.prompts[0] if self.request.return_token_ids and first else None
            extra = b"" if prompt is None else b',"prompt_token_ids":' + encoding.to_json(prompt)
            choice = generate.stream_choice(self.request, sequence, tokens, draws, text, last=self._is_last(sequence))
            self._choice(choice, self._running_usage(sequence), extra)
        else:
            self._send_completion_delta(sequence, tokens, draws, text)

    def _is_last(self, sequence: Sequence) -> bool:
        return sequence.finish_reason is not None and self._handed_out[sequence.index] == sequence.output_length

    def _send_chat_delta(self, sequence: Sequence, tokens: list[int], draws: list[int], text: str) -> None:
        request = self.request
        last = self._is_last(sequence)
        delta: Object | None = {"content": text}
        if request.tool is not None and sequence.script is not None:
            script = sequence.script
            call = self._calls.get(sequence.index)
            if call is None:
                call = self._calls[sequence.index] = CallStream(request.tool, script.start, script.end)
            delta = call.push(text)
        elif self.config.parser and not text:
            delta = None
        if delta is None:
            if not last and not request.return_token_ids and request.logprobs is None:
                return
            delta = {}
        finish_reason = sequence.finish_reason if last else None
        if request.tool_required and finish_reason == "stop":
            finish_reason = "tool_calls"
        choice: Object = {
            "index": sequence.index,
            "delta": delta,
            "logprobs": encoding.chat_logprobs(request, tokens, draws),
            "finish_reason": finish_reason,
        }
        if last:
            choice["stop_reason"] = sequence.stop_reason
        choice["token_ids"] = tokens if request.return_token_ids else None
        self._choice(choice, self._running_usage(sequence))

    def _send_completion_delta(self, sequence: Sequence, tokens: list[int], draws: list[int], text: str) -> None:
        request = self.request
        last = self._is_last(sequence)
        prompt = request.prompts[sequence.index // request.n]
        first = sequence.index not in self._greeted
        self._greeted.add(sequence.index)
        shown: list[int] = tokens
        shown_draws: list[int | None] = list(draws)
        if request.echo and first:
            text = detokenize(prompt) + ("" if request.only_echo else text)
            shown = prompt + ([] if request.only_echo else tokens)
            if request.logprobs is not None:
                generated = [] if request.only_echo else shown_draws
                shown_draws = encoding.prompt_draws(prompt, self.config.weights) + generated
        logprobs = None
        if request.logprobs is not None:
            offset = self._offsets.get(sequence.index, 0)
            logprobs = encoding.completion_logprobs(request, shown, shown_draws, offset)
            assert logprobs is not None
            self._offsets[sequence.index] = offset + sum(map(len, logprobs["tokens"]))
        choice: Object = {
            "index": sequence.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": sequence.finish_reason if last else None,
            "stop_reason": sequence.stop_reason if last else None,
            "prompt_token_ids": prompt if request.return_token_ids and first else None,
            "token_ids": tokens if request.return_token_ids else None,
        }
        self._choice(choice, self._running_usage(sequence))

    def _send_opening(self, sequence: Sequence) -> None:
        """Send the role chunk, once for each choice of a chat."""
        if self.request.kind != "chat" or sequence.index in self._greeted:
            return
        first = not self._greeted
        self._greeted.add(sequence.index)
        ids = self.request.prompts[0] if self.request.return_token_ids and first else None
        choice = {"index": sequence.index, "delta": {"role": "assistant", "content": ""}, **_ROLE_REST}
        extra = b',"prompt_token_ids":' + encoding.to_json(ids)
        prompt_usage = None
        if self.request.continuous_usage:
            prompt_usage = encoding.usage(sequence.prompt_length, 0, None)
        self._choice(choice, prompt_usage, extra)

    def _running_usage(self, sequence: Sequence) -> Object | None:
        if not self.request.continuous_usage:
            return None
        return encoding.usage(sequence.prompt_length, self._handed_out[sequence.index], None)

    def _choice(self, choice: Object, usage: Object | None = None, extra: bytes = b"") -> None:
        data = self._head + encoding.to_json(choice) + b"]" + extra
        if usage is not None:
            data += b',"usage":' + encoding.to_json(usage)
        elif self.request.kind == "completion":
            data += b',"usage":null'
        self.exchange.write(data + b"}\n\n")

    def _end(self) -> None:
        if self._death is not None and self._death.after_tokens < 0:
            self._die(self._death)
            return
        if self._stall is not None and self._stall.after_tokens < 0:
            return
        self._close()
        self.exchange.end_stream()
        self.finish()

    def _close(self) -> None:
        if self.request.include_usage:
            total = encoding.total_usage(self.request, self.sequences, details=self.config.prompt_tokens_details)
            self.exchange.write(self._head + b'],"usage":' + encoding.to_json(total) + b"}\n\n")
        self.exchange.write(encoding.DONE)


_ROLE_REST: Object = {"logprobs": None, "finish_reason": None}


class CallStream:
    """The deltas of a tool call: first the tool's name, then its arguments in the pieces in which they are
    generated."""

    __slots__ = ("_end", "_name", "_named", "_seen", "_start")

    def __init__(self, name: str, start: int, end: int) -> None:
        self._name = name
        self._start = start
        self._end = end
        self._seen = 0
        self._named = False

    def push(self, text: str) -> Object | None:
        """Returns the delta for more of the raw text; None if there is nothing to show."""
        before, self._seen = self._seen, self._seen + len(text)
        if self._seen < self._start:
            return None
        arguments = text[max(self._start - before, 0) : max(self._end - before, 0)]
        if not self._named:
            self._named = True
            function = {"name": self._name, "arguments": arguments}
            return {"tool_calls": [{"index": 0, "id": encoding.call_id(), "type": "function", "function": function}]}
        if not arguments:
            return None
        return {"tool_calls": [{"index": 0, "function": {"arguments": arguments}}]}
