"""Anthropic's messages as vLLM serves them: the same engine as chat's, with requests and answers in another format.

Invariant: a conversation in Anthropic's format and the same conversation in OpenAI's format make the same prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from pd_proxy.decoding import decode_python_json

from pd_proxy_simulator import encoding
from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.errors import RequestError, bad_request, invalid_field
from pd_proxy_simulator.fields import ChatFields, Object, decode_fields
from pd_proxy_simulator.formats import tool_structure, wanted_structure, wanted_tool
from pd_proxy_simulator.prompts import render_chat
from pd_proxy_simulator.requests import GenerationRequest, base_id, check, generation
from pd_proxy_simulator.sequences import Sequence


class Block(msgspec.Struct):
    """A part of a message."""

    type: str
    text: str | None = None
    source: Object | None = None
    id: str | None = None
    tool_use_id: str | None = None
    name: str | None = None
    input: Object | None = None
    content: str | list[Object] | None = None
    thinking: str | None = None


class Message(msgspec.Struct):
    """One turn."""

    role: str
    content: str | list[Block]


class Tool(msgspec.Struct):
    """A tool that may be called."""

    name: str
    input_schema: Object
    description: str | None = None


class MessagesFields(msgspec.Struct):
    """The body's fields; unknown ones are ignored."""

    model: str | None = None
    messages: list[Message] | None = None
    max_tokens: int | None = None
    metadata: Object | None = None
    output_config: Object | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    system: str | list[Block] | None = None
    temperature: float | None = None
    thinking: Object | None = None
    tool_choice: Object | None = None
    tools: list[Tool] | None = None
    top_k: int | None = None
    top_p: float | None = None
    cache_salt: str | None = None
    kv_transfer_params: Object | None = None
    vllm_xargs: Object | None = None


_REQUIRED = ("model", "messages", "max_tokens")


def decode_messages(body: Any, headers: Mapping[str, str], config: SimulatorConfig) -> GenerationRequest:
    """Decode a request. Raises RequestError."""
    fields = decode_fields(body, MessagesFields)
    for name in _REQUIRED:
        if getattr(fields, name) is None:
            raise invalid_field(name, "missing", "Field required", body)
    assert fields.messages is not None and fields.max_tokens is not None
    if fields.max_tokens <= 0:
        raise invalid_field("max_tokens", "value_error", "max_tokens must be positive", fields.max_tokens)
    if any(message.role not in ("user", "assistant", "system") for message in fields.messages):
        raise invalid_field("messages", "literal_error", "Input should be user, assistant or system", body)
    budget = (fields.thinking or {}).get("budget_tokens")
    prefills = bool((fields.kv_transfer_params or {}).get("do_remote_decode"))
    if isinstance(budget, int) and budget >= fields.max_tokens and not prefills:
        raise invalid_field("", "value_error", "thinking.budget_tokens must be less than max_tokens", budget)
    chat = _as_chat(fields)
    check(chat, config)
    tool, required = wanted_tool(chat)
    structure = wanted_structure(chat)
    if tool is not None:
        structure = tool_structure(chat, tool, listed=required)
    assert chat.messages is not None
    prompt = render_chat(chat.messages, chat.tools)
    name = "chatcmpl-" + base_id(chat, headers)
    request = generation("messages", name, chat, config, [prompt], chat.max_tokens, None, structure, tool, required)
    request.body = body
    return request


def _as_chat(fields: MessagesFields) -> ChatFields:
    messages: list[Object] = []
    if fields.system:
        text = fields.system if isinstance(fields.system, str) else "".join(b.text or "" for b in fields.system)
        messages.append({"role": "system", "content": text})
    for message in fields.messages or ():
        messages += _turns(message)
    tools: list[Object] | None = None
    if fields.tools is not None:
        tools = [
            {"type": "function", "function": {"name": tool.name, "parameters": tool.input_schema}}
            for tool in fields.tools
        ]
    form = (fields.output_config or {}).get("format")
    response_format = None
    if isinstance(form, dict) and form.get("type") == "json_schema":
        response_format = {"type": "json_schema", "json_schema": {"schema": form.get("schema")}}
    return ChatFields(
        model=fields.model,
        messages=messages,
        max_tokens=fields.max_tokens,
        stop=fields.stop_sequences,
        stream=fields.stream,
        temperature=fields.temperature,
        top_p=fields.top_p,
        tools=tools,
        tool_choice=_tool_choice(fields.tool_choice),
        response_format=response_format,
        cache_salt=fields.cache_salt,
        kv_transfer_params=fields.kv_transfer_params,
    )


def _tool_choice(choice: Object | None) -> str | Object | None:
    match (choice or {}).get("type"):
        case None | "auto":
            return None
        case "any":
            return "required"
        case "none":
            return "none"
        case "tool" if isinstance((choice or {}).get("name"), str):
            return {"type": "function", "function": {"name": (choice or {})["name"]}}
    raise invalid_field("tool_choice", "literal_error", "Input should be auto, any, tool or none", choice)


def _turns(message: Message) -> list[Object]:
    """A turn in OpenAI's format. Tool results become turns of their own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    turns: list[Object] = []
    parts: list[Object] = []
    calls: list[Object] = []
    for block in message.content:
        match block.type:
            case "text":
                parts.append({"type": "text", "text": block.text or ""})
            case "image":
                parts.append({"type": "image_url", "image_url": block.source})
            case "tool_use":
                function = {"name": block.name, "arguments": json.dumps(block.input or {})}
                calls.append({"id": block.id, "type": "function", "function": function})
            case "tool_result":
                content = block.content
                if isinstance(content, list):
                    content = "\n".join(str(item.get("text", "")) for item in content)
                turns.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content or ""})
            case "thinking" | "redacted_thinking":
                pass
            case _:
                raise invalid_field("messages", "literal_error", "Input should be a known block", block.type)
    if parts or calls:
        turn: Object = {"role": message.role, "content": parts}
        if calls:
            turn["tool_calls"] = calls
        turns.append(turn)
    return turns


def usage(prompt: int, completion: int, cached: int | None, written: int | None = None) -> Object:
    """The usage object. Anthropic counts the tokens that came from a cache, and those written to one, beside the
    others."""
    if cached is None:
        return {"input_tokens": prompt, "output_tokens": completion}
    counts = {"input_tokens": prompt - cached, "output_tokens": completion, "cache_read_input_tokens": cached}
    if written is not None:
        counts |= {"input_tokens": prompt - cached - written, "cache_creation_input_tokens": written}
    return counts


def stop_reason(sequence: Sequence, *, tool_used: bool) -> tuple[str | None, str | None]:
    """`stop_reason` and `stop_sequence`."""
    if sequence.finish_reason == "length":
        return "max_tokens", None
    if sequence.finish_reason == "abort":
        return None, None  # Anthropic has no value for it
    if isinstance(sequence.stop_reason, str):
        return "stop_sequence", sequence.stop_reason
    return ("tool_use" if tool_used else "end_turn"), None


def message_body(finished: encoding.Finished) -> Object:
    """The whole answer. Raises RequestError where a forced tool call is not valid JSON because it was cut short."""
    request, sequence, text = finished.request, finished.sequences[0], finished.texts[0]
    tool_used = False
    content: list[Object] = [{"type": "text", "text": text}]
    if request.tool is not None and sequence.script is not None:
        try:
            arguments = decode_python_json(text[sequence.script.start : sequence.script.end])
        except ValueError as error:
            if not request.tool_required:
                raise bad_request(str(error)) from error
            content = [{"type": "text", "text": ""}]  # in a list of calls that was cut short no call is whole
        else:
            tool_used = True
            content = [{"type": "tool_use", "id": encoding.call_id(), "name": request.tool, "input": arguments}]
    reason, stopped = stop_reason(sequence, tool_used=tool_used)
    body: Object = {
        "id": request.external_id,
        "type": "message",
        "role": "assistant",
        "content": content,
        "model": request.model,
        "stop_reason": reason,
        "stop_sequence": stopped,
        "usage": usage(
            sequence.prompt_length,
            sequence.output_length,
            encoding.cached_tokens(sequence) if finished.details else None,
            sequence.written,
        ),
        "kv_transfer_params": finished.handoff,
    }
    return {name: value for name, value in body.items() if value is not None}


def event(name: str, members: Object) -> bytes:
    """One named event."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), encoding.to_json({"type": name, **members}))


def error_event(error: RequestError) -> bytes:
    """The event that a chat chunk with an error becomes: vLLM's converter fails on it as a chunk of the wrong shape."""
    said = f"2 validation errors for ChatCompletionStreamResponse\nmodel\n  Field required [input_value={error.body()}]"
    return event("error", {"error": {"type": "internal_error", "message": said}})
