"""The JSON of answers: bodies, stream chunks, log probabilities and usage, field for field as vLLM 0.32 writes them.

Invariant: pure functions of what the engine produced; no sockets here.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import msgspec
from pd_proxy.decoding import Undecodable, decode_json, decode_python_json

from pd_proxy_simulator.requests import GenerationRequest
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.tokens import advance as advance_state
from pd_proxy_simulator.tokens import alternatives, detokenize, draw, start_state, token_text

to_json = msgspec.json.Encoder().encode

Object = dict[str, Any]
DONE = b"data: [DONE]\n\n"


def event(payload: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(payload) + b"\n\n"


def usage(prompt: int, completion: int, cached: int | None, written: int | None = None) -> Object:
    """The usage object. Where `cached` is None, the details are left out."""
    more = {} if written is None else {"created_cache_tokens": written}
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": None if cached is None else {"cached_tokens": cached, **more},
    }


def total_usage(request: GenerationRequest, sequences: Items[Sequence], *, details: bool) -> Object:
    """The usage of a request: each prompt counted once, and the output of every choice."""
    prompts = sum(map(len, request.prompts))
    completion = sum(sequence.output_length for sequence in sequences)
    written = sequences[-1].written if request.kind == "chat" else None
    return usage(prompts, completion, cached_tokens(sequences[-1]) if details else None, written)


def cached_tokens(sequence: Sequence) -> int:
    """The number of tokens that is reported as cached: prefill's own number, if the KV came from there with that
    number."""
    if sequence.external and sequence.remote_cached is not None:
        return sequence.remote_cached
    return sequence.cached + sequence.external


# Log probabilities.


def _shown(token: int, as_id: bool) -> str:
    return f"token_id:{token}" if as_id else token_text(token)


def chat_logprobs(request: GenerationRequest, tokens: Items[int], draws: Items[int]) -> Object | None:
    """`choices[].logprobs` of chat."""
    if request.logprobs is None:
        return None
    content = []
    for token, bits in zip(tokens, draws, strict=True):
        likely = [
            _chat_entry(other, value, request.tokens_as_ids)
            for other, value in alternatives(bits, token, max(request.logprobs, 1))
        ]
        content.append({**likely[0], "top_logprobs": likely[: request.logprobs]})
    return {"content": content}


def _chat_entry(token: int, value: float, as_id: bool) -> Object:
    shown = _shown(token, as_id)
    return {"token": shown, "logprob": value, "bytes": list(shown.encode())}


def completion_logprobs(
    request: GenerationRequest, tokens: Items[int], draws: Items[int | None], offset: int
) -> Object | None:
    """`choices[].logprobs` of completions. A draw that is None marks the first token of an echoed prompt."""
    if request.logprobs is None:
        return None
    offsets: list[int] = []
    values: list[float | None] = []
    shown: list[str] = []
    tops: list[Object | None] = []
    for token, bits in zip(tokens, draws, strict=True):
        text = _shown(token, request.tokens_as_ids)
        offsets.append(offset)
        shown.append(text)
        offset += len(text)
        if bits is None:
            values.append(None)
            tops.append(None)
            continue
        likely = alternatives(bits, token, max(request.logprobs, 1))
        values.append(likely[0][1])
        tops.append({_shown(other, request.tokens_as_ids): value for other, value in likely})
    return {"text_offset": offsets, "token_logprobs": values, "tokens": shown, "top_logprobs": tops}


def prompt_draws(prompt: Items[int], weights: int) -> list[int | None]:
    """The draws from which a prompt's own log probabilities follow."""
    state = start_state(weights)
    draws: list[int | None] = []
    for token in prompt:
        draws.append(draw(state, 0) if draws else None)
        state = advance_state(state, token)
    return draws


def prompt_logprobs(request: GenerationRequest, prompt: Items[int], weights: int) -> list[Object | None] | None:
    """`prompt_logprobs`: None for the first token, then the likeliest tokens by id."""
    count = request.prompt_logprobs
    if count is None:
        return None
    entries: list[Object | None] = []
    for token, bits in zip(prompt, prompt_draws(prompt, weights), strict=True):
        if bits is None:
            entries.append(None)
            continue
        entries.append(
            {
                str(other): {"logprob": value, "rank": rank, "decoded_token": token_text(other)}
                for rank, (other, value) in enumerate(alternatives(bits, token, max(count, 1)), start=1)
            }
        )
    return entries


# Whole bodies.


@dataclass(frozen=True, slots=True)
class Finished:
    """A request whose sequences have all ended: the values from which the body of its answer is made.

    Attributes:
        sequences, texts: one each for every choice, in the same order.
        created: when the request arrived, in seconds since the epoch.
        details: whether the usage says how much of the prompt was cached.
        weights: the model's weights, from which log probabilities follow.
        handoff: the parameters that a prefill leg answers with.
    """

    request: GenerationRequest
    sequences: Items[Sequence]
    texts: Items[str]
    created: int
    details: bool
    weights: int
    handoff: Object | None

    def choices(self) -> Iterator[tuple[Sequence, str]]:
        """Each sequence with its text."""
        return zip(self.sequences, self.texts, strict=True)


def chat_body(finished: Finished) -> Object:
    """The body of a chat completion."""
    request = finished.request
    choices = []
    for sequence, text in finished.choices():
        message, finish_reason = _message(request, sequence, text)
        choices.append(
            {
                "index": sequence.index,
                "message": message,
                "logprobs": chat_logprobs(request, sequence.output, sequence.draws or []),
                "finish_reason": finish_reason,
                "stop_reason": sequence.stop_reason,
                "token_ids": sequence.output if request.return_token_ids else None,
            }
        )
    return {
        "id": request.external_id,
        "object": "chat.completion",
        "created": finished.created,
        "model": request.model,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": None,
        "usage": total_usage(request, finished.sequences, details=finished.details),
        "prompt_logprobs": prompt_logprobs(request, request.prompts[0], finished.weights),
        "prompt_token_ids": request.prompts[0] if request.return_token_ids else None,
        "kv_transfer_params": finished.handoff,
    }


def _message(request: GenerationRequest, sequence: Sequence, text: str) -> tuple[Object, str | None]:
    message: Object = {
        "role": "assistant",
        "content": text,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": [],
        "reasoning": None,
    }
    finish_reason = sequence.finish_reason
    if request.tool is None or sequence.script is None:
        return message, finish_reason
    arguments = text[sequence.script.start : sequence.script.end]
    message["content"] = ""
    message["tool_calls"] = [
        {"id": call_id(), "type": "function", "function": {"name": request.tool, "arguments": arguments}}
    ]
    if request.tool_required and finish_reason == "stop":
        finish_reason = "tool_calls"
    return message, finish_reason


def call_id() -> str:
    """A tool call's id."""
    return f"chatcmpl-tool-{uuid.uuid4().hex}"


def completion_body(finished: Finished) -> Object:
    """The body of a text completion."""
    request, weights = finished.request, finished.weights
    choices = []
    for sequence, generated in finished.choices():
        prompt = request.prompts[sequence.index // request.n]
        text, tokens = generated, sequence.output
        draws: list[int | None] = list(sequence.draws or [])
        if request.only_echo:
            text, tokens, draws = "", [], []
        if request.echo:
            text = detokenize(prompt) + text
            tokens = prompt + tokens
            draws = prompt_draws(prompt, weights) + draws if request.logprobs is not None else draws
        choices.append(
            {
                "index": sequence.index,
                "text": text,
                "logprobs": completion_logprobs(request, tokens, draws, 0) if request.logprobs is not None else None,
                "finish_reason": sequence.finish_reason,
                "stop_reason": sequence.stop_reason,
                "token_ids": sequence.output if request.return_token_ids else None,
                "prompt_logprobs": prompt_logprobs(request, prompt, weights),
                "prompt_token_ids": prompt if request.return_token_ids else None,
            }
        )
    return {
        "id": request.external_id,
        "object": "text_completion",
        "created": finished.created,
        "model": request.model,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": None,
        "usage": total_usage(request, finished.sequences, details=finished.details),
        "kv_transfer_params": finished.handoff,
    }


def head(request: GenerationRequest, created: int) -> bytes:
    """The beginning of every chunk of a stream; the choices follow."""
    if request.kind == "generate":
        mode = request.body.get("output_mode", "tokens")
        return b"data: " + to_json({"request_id": request.external_id, "output_mode": mode})[:-1] + b',"choices":['
    kind = "chat.completion.chunk" if request.kind == "chat" else "text_completion"
    start = {"id": request.external_id, "object": kind, "created": created, "model": request.model}
    return b"data: " + to_json(start)[:-1] + b',"choices":['


def loads(body: bytes) -> Any:
    """Decode a request's JSON. Raises ValueError."""
    try:
        return decode_json(body)
    except Undecodable:
        return decode_python_json(body)


def encoded(external_id: str, model: str, prompt_tokens: int, params: Object | None) -> Object:
    """The body of an encoder's answer, which has no tokens."""
    return {
        "id": external_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": "stop"}
        ],
        "usage": usage(prompt_tokens, 0, None),
        "kv_transfer_params": None,
        "ec_transfer_params": params,
    }
