"""OpenAI's responses as vLLM serves them, and the store that keeps them where the server is configured for it.

Invariant: a stored response equals the one that its client received; a new engine has none.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pd_proxy_simulator import encoding
from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.errors import RequestError, bad_request, invalid_field
from pd_proxy_simulator.fields import ChatFields, Object, decode_fields
from pd_proxy_simulator.formats import tool_structure, wanted_structure, wanted_tool
from pd_proxy_simulator.prompts import render_chat
from pd_proxy_simulator.requests import GenerationRequest, check, generation


class ResponsesFields(msgspec.Struct):
    """The body's fields; unknown ones are ignored."""

    model: str | None = None
    input: str | list[Object] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    background: bool | None = None
    store: bool | None = None
    stream: bool | None = None
    include: list[str] | None = None
    metadata: Object | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    prompt: Object | None = None
    request_id: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: Object | None = None
    tool_choice: str | Object | None = None
    tools: list[Object] | None = None
    top_logprobs: int | None = None
    truncation: str | None = None
    user: str | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    structured_outputs: Object | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    kv_transfer_params: Object | None = None
    vllm_xargs: Object | None = None


@dataclass(slots=True)
class StoredResponse:
    """One response, and the conversation that it continues.

    `events` are those of one that is streamed in the background; `abort` ends one that is running.
    """

    body: Object
    messages: list[Object]
    events: list[bytes] = field(default_factory=list)
    over: bool = False
    abort: Callable[[], None] | None = None

    def cancel(self) -> Object:
        """End the response. Raises RequestError where it is not running."""
        if self.body["status"] not in ("queued", "in_progress"):
            message = "Cannot cancel a synchronous response."
            raise RequestError(400, "invalid_request_error", message, "response_id")
        self.body["status"] = "cancelled"
        self.over = True
        if self.abort is not None:
            self.abort()
        return self.body


class ResponseStore:
    """Responses by their ids."""

    def __init__(self) -> None:
        self._kept: dict[str, StoredResponse] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, response: StoredResponse) -> None:
        """Keep a response."""
        self._kept[response.body["id"]] = response

    def find(self, response_id: str) -> StoredResponse:
        """Return a stored response. Raises RequestError."""
        if found := self._kept.get(response_id):
            return found
        message = f"Response with id '{response_id}' not found."
        raise RequestError(404, "invalid_request_error", message, "response_id")


def decode_response(body: Any, config: SimulatorConfig, store: ResponseStore) -> tuple[GenerationRequest, list[Object]]:
    """Decode a request, with the conversation that it continues. Raises RequestError."""
    fields = decode_fields(body, ResponsesFields)
    if fields.input is None:
        raise invalid_field("input", "missing", "Field required", body)
    if fields.background and fields.store is False:
        raise invalid_field("background", "value_error", "background can only be used when `store` is true", body)
    if fields.prompt is not None:
        raise invalid_field("prompt", "value_error", "prompt template is not supported", fields.prompt)
    if fields.truncation not in (None, "auto", "disabled"):
        raise invalid_field("truncation", "literal_error", "Input should be auto or disabled", fields.truncation)
    if fields.background and not config.responses_store:
        message = "This vLLM engine does not support `store=True` and therefore does not support the background mode."
        raise RequestError(400, "invalid_request_error", message, "background")
    messages: list[Object] = []
    if fields.previous_response_id is not None:
        previous = store.find(fields.previous_response_id)
        said = "".join(part["text"] for item in previous.body["output"] for part in item.get("content", ()))
        messages = [*previous.messages, {"role": "assistant", "content": said}]
    messages += _turns(fields.input)
    given = [] if fields.instructions is None else [{"role": "system", "content": fields.instructions}]
    chat = _as_chat(fields, given + messages)
    check(chat, config)
    tool, required = wanted_tool(chat)
    structure = wanted_structure(chat)
    if tool is not None:
        structure = tool_structure(chat, tool, listed=required)
    assert chat.messages is not None
    prompt = render_chat(chat.messages, chat.tools)
    name = fields.request_id or f"resp_{uuid.uuid4().hex}"
    limit = fields.max_output_tokens
    if limit is not None and len(prompt) < config.context:
        limit = min(limit, config.context - len(prompt))
    request = generation("responses", name, chat, config, [prompt], limit, None, structure, tool, required)
    request.body = body
    return request, messages


def _as_chat(fields: ResponsesFields, messages: list[Object]) -> ChatFields:
    tools = [
        {"type": "function", "function": {"name": tool.get("name"), "parameters": tool.get("parameters")}}
        for tool in fields.tools or ()
        if tool.get("type") == "function"
    ]
    choice = fields.tool_choice
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    form = (fields.text or {}).get("format")
    response_format = None
    if isinstance(form, dict) and form.get("type") == "json_schema":
        response_format = {"type": "json_schema", "json_schema": {"schema": form.get("schema")}}
    return ChatFields(
        model=fields.model,
        messages=messages,
        stream=fields.stream,
        temperature=fields.temperature,
        top_p=fields.top_p,
        seed=fields.seed,
        stop=fields.stop,
        stop_token_ids=fields.stop_token_ids,
        ignore_eos=fields.ignore_eos,
        cache_salt=fields.cache_salt,
        priority=fields.priority,
        tools=tools or None,
        tool_choice=choice if tools else None,
        response_format=response_format,
        structured_outputs=fields.structured_outputs,
        kv_transfer_params=fields.kv_transfer_params,
    )


def _turns(given: str | list[Object]) -> list[Object]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    turns: list[Object] = []
    for item in given:
        match item.get("type", "message"):
            case "message":
                content = item.get("content")
                if isinstance(content, list):
                    content = [
                        {"type": "text", "text": part.get("text", "")}
                        if str(part.get("type", "")).endswith("_text")
                        else part
                        for part in content
                    ]
                turns.append({"role": item.get("role"), "content": content})
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                turns.append({"role": "assistant", "content": None, "tool_calls": [call]})
            case "function_call_output":
                turns.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
            case "reasoning":
                pass
            case kind:
                raise bad_request(f"Unknown item type: {kind}", "input")
    return turns


def outline(request: GenerationRequest, created: int, status: str, output: list[Object]) -> Object:
    """The response object without the fields that only its end determines."""
    body = request.body
    sampling = request.sampling[0]
    return {
        "id": request.external_id,
        "created_at": created,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata"),
        "model": request.model,
        "object": "response",
        "output": output,
        "parallel_tool_calls": body.get("parallel_tool_calls", True),
        "temperature": 1.0 if body.get("temperature") is None else body["temperature"],
        "tool_choice": body.get("tool_choice", "auto" if body.get("tools") else "none"),
        "tools": body.get("tools") or [],
        "top_p": 1.0 if body.get("top_p") is None else body["top_p"],
        "background": bool(body.get("background")),
        "max_output_tokens": sampling.max_tokens,
        "max_tool_calls": None,
        "previous_response_id": body.get("previous_response_id"),
        "prompt": None,
        "reasoning": None,
        "service_tier": "auto",
        "status": status,
        "text": body.get("text"),
        "top_logprobs": None,
        "truncation": body.get("truncation") or "disabled",
        "usage": None,
        "user": body.get("user"),
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "input_messages": None,
        "output_messages": None,
    }


def message_item(text: str, item_id: str | None = None) -> Object:
    """The output item of the model's text."""
    content: list[Object] = [{"annotations": [], "text": text, "type": "output_text", "logprobs": None}] if text else []
    return {
        "id": item_id or f"msg_{uuid.uuid4().hex}",
        "content": content,
        "role": "assistant",
        "status": "completed",
        "type": "message",
    }


def call_item(name: str | None, arguments: str, item_id: str | None = None, status: str = "completed") -> Object:
    """The output item of a tool call."""
    unique = uuid.uuid4().hex
    return {
        "id": item_id or f"fc_{unique}",
        "call_id": f"call_{unique}",
        "name": name,
        "arguments": arguments,
        "type": "function_call",
        "status": status,
    }


def response_body(finished: encoding.Finished, output: list[Object] | None = None) -> Object:
    """The whole answer. `output` holds the items where they have been streamed already."""
    request, sequence, text = finished.request, finished.sequences[0], finished.texts[0]
    if output is None:
        output = [message_item(text)]
        if request.tool is not None and sequence.script is not None:
            output = [call_item(request.tool, text[sequence.script.start : sequence.script.end])]
    # vLLM says "cancelled" of models with harmony; for others it says "completed", which hides the abort.
    status = {"length": "incomplete", "abort": "cancelled"}.get(sequence.finish_reason or "", "completed")
    body = outline(request, finished.created, status, output)
    body["usage"] = {
        "input_tokens": sequence.prompt_length,
        "input_tokens_details": {
            "cached_tokens": encoding.cached_tokens(sequence),
            "cached_tokens_per_turn": [encoding.cached_tokens(sequence)],
            **({} if sequence.written is None else {"cache_write_tokens": sequence.written}),
        },
        "output_tokens": sequence.output_length,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": sequence.prompt_length + sequence.output_length,
    }
    body["kv_transfer_params"] = finished.handoff
    return body
