"""Streams whose events have names: Anthropic's messages and OpenAI's responses.

Invariant: events come in the order in which vLLM sends them, and blocks and items that were opened are closed before
the last one.
"""

from __future__ import annotations

import uuid
from typing import Any

from pd_proxy_simulator import encoding, messages, responses
from pd_proxy_simulator.answers import GARBAGE, CallStream, Object, StreamAnswer
from pd_proxy_simulator.errors import RequestError, internal_error
from pd_proxy_simulator.faults import Fault
from pd_proxy_simulator.sequences import Sequence


class NamedStream(StreamAnswer):
    """What both streams have in common."""

    def fail_first(self, error: RequestError) -> None:
        """Carry out the fault `error_event_first`: an error event before any token."""
        self._open()
        self._fail(error)

    def _send_opening(self, sequence: Sequence) -> None:
        if sequence.index not in self._greeted:
            self._greeted.add(sequence.index)
            self._open()

    def _send_delta(self, sequence: Sequence, tokens: list[int], draws: list[int], text: str) -> None:
        if self.request.tool is None or sequence.script is None:
            if text:
                self._text(text)
            return
        call = self._calls.get(sequence.index)
        if call is None:
            call = self._calls[sequence.index] = CallStream(
                self.request.tool, sequence.script.start, sequence.script.end
            )
        delta = call.push(text)
        if delta is not None:
            function = delta["tool_calls"][0]["function"]
            self._call(function.get("name"), function["arguments"])

    def _break_off(self, death: Fault) -> None:
        exchange = self.exchange
        match death.ending:
            case "truncated":
                exchange.raw(b"%x\r\nevent: " % 256)
            case "garbage":
                exchange.raw(GARBAGE)
            case "json":
                exchange.write(b'event: content\ndata: {"type": "conte\n\n')
                exchange.end_stream()
                return
            case "error":
                self._fail(internal_error())
                return
            case "done" | "end":
                exchange.end_stream()
                return
        exchange.cut(polite=death.ending != "reset")

    def _open(self) -> None:
        """Send the events that come before any token."""
        raise NotImplementedError

    def _text(self, text: str) -> None:
        raise NotImplementedError

    def _call(self, name: str | None, arguments: str) -> None:
        raise NotImplementedError


class MessageStream(NamedStream):
    """A stream from `message_start` to `message_stop`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._block = ""

    def _send(self, name: str, **members: Any) -> None:
        self.exchange.write(messages.event(name, members))

    def _open(self) -> None:
        message: Object = {
            "id": self.request.external_id,
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": self.request.model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": messages.usage(len(self.request.prompts[0]), 0, None),
        }
        self._send("message_start", message=message)

    def _open_block(self, kind: str, block: Object) -> None:
        if not self._block:
            self._block = kind
            self._send("content_block_start", index=0, content_block=block)

    def _text(self, text: str) -> None:
        self._open_block("text", {"type": "text", "text": ""})
        self._send("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

    def _call(self, name: str | None, arguments: str) -> None:
        self._open_block("tool_use", {"type": "tool_use", "id": encoding.call_id(), "name": name, "input": {}})
        if arguments:
            self._send("content_block_delta", index=0, delta={"type": "input_json_delta", "partial_json": arguments})

    def _close(self) -> None:
        sequence = self.sequences[0]
        if self._block:
            self._send("content_block_stop", index=0)
        reason, stopped = messages.stop_reason(sequence, tool_used=self._block == "tool_use")
        cached = encoding.cached_tokens(sequence) if self.config.prompt_tokens_details else None
        self._send(
            "message_delta",
            delta={"stop_reason": reason, "stop_sequence": stopped},
            usage=messages.usage(sequence.prompt_length, sequence.output_length, cached, sequence.written),
        )
        self._send("message_stop")

    def _fail(self, error: RequestError) -> None:
        self.exchange.write(messages.error_event(error))
        self.exchange.end_stream()
        self.finish()


class ResponseStream(NamedStream):
    """A stream from `response.created` to `response.completed`, with numbered events. No event reports a failure:
    vLLM's generator raises, and the connection ends."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._sequence_number = 0
        self._texts: list[str] = []
        self._arguments: list[str] = []
        self._item: Object | None = None
        self.body: Object | None = None  # the response, once it is complete

    def start(self) -> None:
        """Announce the response, before the engine has begun."""
        self.exchange.start_stream()
        self.exchange.on_writable = self._send_backlog
        self._greeted.add(0)
        self._open()
        self._stalled = self._stall is not None and self._stall.after_tokens == 0
        self.dies_now()

    def fail_first(self, error: RequestError) -> None:
        """Carry out the fault `error_event_first`: responses have no such event."""
        self._fail(error)

    def _send(self, name: str, /, **members: Any) -> None:
        data = encoding.to_json({**members, "sequence_number": self._sequence_number, "type": name})
        self._sequence_number += 1
        self.exchange.write(b"event: %b\ndata: %b\n\n" % (name.encode(), data))

    def _open(self) -> None:
        body = responses.outline(self.request, self.created, "in_progress", [])
        self._send("response.created", response=body)
        self._send("response.in_progress", response=body)

    def _text(self, text: str) -> None:
        if self._item is None:
            self._item = {**responses.message_item(""), "status": "in_progress"}
            self._send("response.output_item.added", output_index=0, item=self._item)
            part = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
            self._send("response.content_part.added", **self._where(), part=part)
        self._texts.append(text)
        self._send("response.output_text.delta", **self._where(), delta=text, logprobs=[])

    def _call(self, name: str | None, arguments: str) -> None:
        if self._item is None:
            self._item = responses.call_item(name, "", f"fc_{uuid.uuid4().hex}", "in_progress")
            self._send("response.output_item.added", output_index=0, item=self._item)
        if arguments:
            self._arguments.append(arguments)
            name = "response.function_call_arguments.delta"
            self._send(name, item_id=self._item["id"], output_index=0, delta=arguments)

    def _where(self) -> Object:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": 0, "content_index": 0}

    def _close(self) -> None:
        output: list[Object] = []
        if self._item is not None and self._item["type"] == "function_call":
            arguments = "".join(self._arguments)
            item = {**self._item, "arguments": arguments, "status": "completed"}
            name = "response.function_call_arguments.done"
            self._send(name, item_id=item["id"], output_index=0, arguments=arguments, name=item["name"])
            output = [item]
        elif self._item is not None:
            text = "".join(self._texts)
            item = responses.message_item(text, self._item["id"])
            self._send("response.output_text.done", **self._where(), text=text, logprobs=[])
            self._send("response.content_part.done", **self._where(), part=item["content"][0])
            output = [item]
        if output:
            self._send("response.output_item.done", output_index=0, item=output[0])
        # The last event is made by the same code as a whole answer, so it has the same fields.
        handoff = self.handoff or self.request.body.get("kv_transfer_params")
        self.body = responses.response_body(self.finished(["".join(self._texts)], handoff), output)
        self._send("response.completed", response=self.body)

    def _fail(self, error: RequestError) -> None:
        self.exchange.cut(polite=True)
        self.finish()
