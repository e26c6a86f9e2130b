"""Routes that are answered at once, without the engine: models, tokenizing, rendering, counting, adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pd_proxy_simulator import encoding, pooling
from pd_proxy_simulator.engine_process import EngineProcess
from pd_proxy_simulator.errors import RequestError, invalid_field
from pd_proxy_simulator.http import Exchange
from pd_proxy_simulator.page import server_info
from pd_proxy_simulator.paths import RENDER
from pd_proxy_simulator.prompts import completion_prompts, render_chat
from pd_proxy_simulator.tokens import detokenize, token_text, tokenize

Object = dict[str, Any]


def answer_plainly(sim: EngineProcess, exchange: Exchange) -> bool:
    """Answer a request if its path is one of these; returns whether it was. Raises RequestError."""
    path = exchange.path
    if path in RENDER:
        exchange.respond(200, encoding.to_json(_render(sim, path, read_object(exchange))))
    elif path == "/v1/models":
        exchange.respond(200, encoding.to_json({"object": "list", "data": sim.adapters.cards()}))
    elif path == "/server_info":
        exchange.respond(200, encoding.to_json(server_info(sim.config)))
    elif (answer := _OF_A_BODY.get(path)) is not None:
        exchange.respond(200, encoding.to_json(answer(sim, read_object(exchange))))
    elif path == "/v1/load_lora_adapter":
        exchange.respond(200, sim.adapters.load(read_object(exchange)).encode(), "text/plain")
    elif path == "/v1/unload_lora_adapter":
        exchange.respond(200, sim.adapters.unload(read_object(exchange)).encode(), "text/plain")
    else:
        return False
    return True


def read_object(exchange: Exchange) -> Any:
    """The JSON object in a request's body. Raises RequestError."""
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


def _tokenize(sim: EngineProcess, body: Any) -> Object:
    if isinstance(body.get("messages"), list):
        generation = body.get("add_generation_prompt") is not False
        tokens = render_chat(body["messages"], body.get("tools"), add_generation_prompt=generation)
    elif isinstance(body.get("prompt"), str):
        tokens = tokenize(body["prompt"])
    else:
        raise invalid_field("prompt", "missing", "Field required", body)
    shown = [token_text(token) for token in tokens] if body.get("return_token_strs") else None
    return {"count": len(tokens), "max_model_len": sim.config.context, "tokens": tokens, "token_strs": shown}


def _detokenize(_sim: EngineProcess, body: Any) -> Object:
    return {"prompt": detokenize(body.get("tokens") or [], special=True)}


def _count(sim: EngineProcess, body: Any) -> Object:
    """The answer of /v1/messages/count_tokens, in Anthropic's shape."""
    pooling.check_model(body, sim.config)
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise invalid_field("messages", "missing", "Field required", body)
    if system := body.get("system"):
        messages = [{"role": "system", "content": system}, *messages]
    return {"input_tokens": len(render_chat(messages, body.get("tools")))}


def _render(sim: EngineProcess, path: str, body: Any) -> Any:
    """Answer a request of a `…/render` path: its prompt as token ids, in the form that /inference/v1/generate takes."""
    pooling.check_model(body, sim.config)
    if path == "/v1/completions/render":
        prompts = completion_prompts(body.get("prompt"))
        return [{"token_ids": tokens, "sampling_params": {}} for tokens in prompts]
    prompt = body.get("input") if path == "/v1/responses/render" else body.get("messages")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list):
        raise invalid_field("messages", "missing", "Field required", body)
    return {"token_ids": render_chat(messages, body.get("tools")), "sampling_params": {}}


_OF_A_BODY: dict[str, Callable[[EngineProcess, Any], Object]] = {
    "/tokenize": _tokenize,
    "/detokenize": _detokenize,
    "/v1/messages/count_tokens": _count,
}
"""Paths whose answer is made from the body."""
