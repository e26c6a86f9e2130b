"""`POST /inference/v1/generate`: tokens in, tokens out, with vLLM's own sampling parameters.

Invariant: text is made only where it is asked for (`output_mode` "text"). The tokens are those of every other endpoint
for the same prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Any

import msgspec

from pd_proxy_simulator import encoding
from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.errors import RequestError, bad_request, invalid_field
from pd_proxy_simulator.fields import CommonFields, Object, StreamOptions, decode_fields
from pd_proxy_simulator.formats import wanted_structure
from pd_proxy_simulator.requests import GenerationRequest, base_id, check, generation
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.tokens import VOCABULARY_SIZE, alternatives


class GenerateFields(msgspec.Struct):
    """The body's fields; all sampling parameters are inside `sampling_params`."""

    token_ids: list[int] | None = None
    sampling_params: Object | None = None
    model: str | None = None
    request_id: str | None = None
    output_mode: str = "tokens"
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    priority: int | None = None
    kv_transfer_params: Object | None = None


class SamplingFields(CommonFields):
    """The fields of `sampling_params`. Their defaults differ from the other endpoints': the default is not greedy."""

    logprobs: int | None = None
    extra_args: Object | None = None


def with_handoff_params(body: Any) -> Any:
    """A body with the hand-off's parameters where the connector looks for them. `sampling_params.extra_args` may
    hold them too, and the engine takes them from there."""
    sampling = body.get("sampling_params")
    extra = sampling.get("extra_args") if isinstance(sampling, dict) else None
    return {**extra, **body} if isinstance(extra, dict) else body


def decode_generate(body: Any, headers: Mapping[str, str], config: SimulatorConfig) -> GenerationRequest:
    """Decode a request. Raises RequestError."""
    fields = decode_fields(body, GenerateFields)
    if not fields.token_ids:
        raise invalid_field("token_ids", "missing" if fields.token_ids is None else "too_short", "Field required", body)
    if fields.sampling_params is None:
        raise invalid_field("sampling_params", "missing", "Field required", body)
    if any(token < 0 for token in fields.token_ids):
        raise invalid_field("token_ids", "value_error", "token_ids must not contain negative values", fields.token_ids)
    if fields.output_mode not in ("tokens", "text"):
        raise invalid_field("output_mode", "literal_error", "Input should be tokens or text", fields.output_mode)
    sampling = decode_fields(fields.sampling_params, SamplingFields)
    # SamplingParams validates itself when it is made, so before the handler.
    most = sampling.max_tokens
    if most is not None and (most < 1 or (sampling.min_tokens or 0) > most):
        message = f"min_tokens must be less than or equal to max_tokens={most}, got {sampling.min_tokens}."
        raise invalid_field("sampling_params", "value_error", message, fields.sampling_params)
    if not config.scale_out:
        message = "Generate endpoints are disabled; start the server with --enable-scale-out"
        raise RequestError(403, "PermissionDeniedError", message)
    if any(token >= VOCABULARY_SIZE for token in fields.token_ids):
        raise bad_request(f"Token id {max(fields.token_ids)} is out of vocabulary", "token_ids")
    for name in ("model", "stream", "stream_options", "cache_salt", "priority", "request_id", "return_token_ids"):
        setattr(sampling, name, getattr(fields, name))
    check(sampling, config)
    name = "generate-tokens-" + base_id(sampling, headers)
    structure = wanted_structure(sampling)
    request = generation(
        "generate",
        name,
        sampling,
        config,
        [fields.token_ids],
        sampling.max_tokens,
        sampling.logprobs,
        structure,
        None,
        False,
    )
    request.body = body
    return request


def _logprobs(request: GenerationRequest, tokens: Items[int], draws: Items[int]) -> Object | None:
    if request.logprobs is None:
        return None
    content = []
    for token, bits in zip(tokens, draws, strict=True):
        likely = [
            {"token_id": other, "logprob": value, "rank": rank}
            for rank, (other, value) in enumerate(alternatives(bits, token, max(request.logprobs, 1)), start=1)
        ]
        content.append({**likely[0], "top_logprobs": likely[: request.logprobs]})
    return {"content": content}


def stream_choice(
    request: GenerationRequest, sequence: Sequence, tokens: list[int], draws: list[int], text: str, *, last: bool
) -> Object:
    """One choice of one chunk."""
    choice: Object = {
        "index": sequence.index,
        "finish_reason": sequence.finish_reason if last else None,
        "stop_reason": sequence.stop_reason if last else None,
        "token_ids": tokens,
        "routed_experts": None,
        "logprobs": _logprobs(request, tokens, draws),
    }
    if request.body.get("output_mode") == "text":
        choice["text"] = text
    return choice


def generate_body(finished: encoding.Finished) -> Object:
    """The whole answer."""
    request = finished.request
    choices = [
        stream_choice(request, sequence, sequence.output, sequence.draws or [], text, last=True)
        for sequence, text in finished.choices()
    ]
    return {
        "request_id": request.external_id,
        "model": request.model,
        "created": finished.created,
        "usage": encoding.total_usage(request, finished.sequences, details=finished.details),
        "output_mode": request.body.get("output_mode", "tokens"),
        "choices": choices,
        "prompt_logprobs": encoding.prompt_logprobs(request, request.prompts[0], finished.weights),
        "prompt_token_ids": request.prompts[0] if request.return_token_ids else None,
        "kv_transfer_params": finished.handoff,
        "ec_transfer_params": None,
    }
