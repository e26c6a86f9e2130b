"""SGLang's own `POST /generate`: text or token ids, one prompt or a batch, with SGLang's sampling parameters.

The source is SGLang 0.5.23 (`io_struct.py`, `tokenizer_manager.py`). A list of prompts is a batch, even with one
prompt; its answer is a list. Decode lacks what only the engine has that computed the prompt: the prompt's log
probabilities.

Invariant: the tokens are those of every other endpoint for the same prompt.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence as Items
from typing import Any

import msgspec

from pd_proxy_simulator import encoding
from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.connectors.sglang import batch_size
from pd_proxy_simulator.errors import RequestError, bad_request, invalid_field
from pd_proxy_simulator.fields import CommonFields, Object, decode_fields
from pd_proxy_simulator.requests import GenerationRequest, generation
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.tokens import EOS, VOCABULARY_SIZE, alternatives, token_text, tokenize

_DEFAULT_TOKENS = 128


class _Fields(msgspec.Struct):
    """The body's fields, as far as they matter here. A list holds one value for each prompt. Unknown fields are
    ignored."""

    text: str | list[str] | None = None
    input_ids: list[Any] | None = None
    input_embeds: list[Any] | None = None
    sampling_params: Object | list[Object] | None = None
    rid: str | list[str] | None = None
    stream: bool = False
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    return_text_in_logprobs: bool = False


class _Sampling(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of `sampling_params`. An unknown name is an error: the engine's constructor raises."""

    max_new_tokens: int | None = _DEFAULT_TOKENS
    min_new_tokens: int = 0
    n: int = 1
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_regex: str | list[str] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    sampling_seed: int | None = None
    custom_params: Object | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None
    logit_bias: Object | None = None
    stream_interval: int | None = None


def decode_sglang_generate(body: Any, config: SimulatorConfig) -> GenerationRequest:
    """Decode a request. Raises RequestError."""
    fields = decode_fields(body, _Fields)
    prompts = _prompts(fields, config)
    sampling = _sampling(fields, len(prompts))
    count = batch_size(body)
    if isinstance(fields.rid, list):
        if len(fields.rid) != count:
            raise bad_request("The specified rids length mismatch with the batch_size for batch processing.")
        if len(set(fields.rid)) != count:
            raise bad_request(f"Duplicate request IDs detected within the request: {fields.rid}")
    for name in ("return_logprob", "logprob_start_len", "top_logprobs_num"):
        value = getattr(fields, name)
        if isinstance(value, list) and len(value) != max(count, 1):
            raise bad_request(f"The length of {name} should be equal to the batch size.")
    if sampling.max_new_tokens is not None and sampling.max_new_tokens < 1:
        raise bad_request(f"max_new_tokens must be at least 1 here, got {sampling.max_new_tokens}.")
    common = CommonFields(
        n=sampling.n,
        min_tokens=sampling.min_new_tokens,
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        include_stop_str_in_output=sampling.no_stop_trim,
        ignore_eos=sampling.ignore_eos,
        seed=sampling.sampling_seed,
        temperature=sampling.temperature,
        stream=fields.stream,
    )
    name = fields.rid if isinstance(fields.rid, str) else uuid.uuid4().hex
    scored = any(_each(fields.return_logprob, prompt) for prompt in range(len(prompts)))
    limit, logprobs = sampling.max_new_tokens, 0 if scored else None
    request = generation("sglang_generate", name, common, config, prompts, limit, logprobs, None, None, False)
    request.body = body
    return request


def _prompts(fields: _Fields, config: SimulatorConfig) -> list[list[int]]:
    given = (fields.text, fields.input_ids, fields.input_embeds)
    if all(one is None for one in given) or all(one is not None for one in given):
        raise bad_request("Either text, input_ids or input_embeds should be provided.")
    if fields.input_ids is not None:
        if not fields.input_ids:
            raise bad_request("input_ids cannot be empty.")
        single = isinstance(fields.input_ids[0], int)
        prompts = [fields.input_ids] if single else fields.input_ids
        for prompt in prompts:
            if not isinstance(prompt, list) or not prompt:
                raise bad_request("input_ids should be a list of lists for batch processing.")
            if any(type(token) is not int for token in prompt):
                raise invalid_field("input_ids", "int_type", "Input should be a valid integer", prompt)
            if any(not 0 <= token < VOCABULARY_SIZE for token in prompt):
                raise bad_request(f"The input_ids {prompt} contains values out of the vocabulary.")
    elif fields.text is not None:
        texts = [fields.text] if isinstance(fields.text, str) else fields.text
        prompts = [tokenize(text) for text in texts]
    else:
        message = "input_embeds is provided while disable_radix_cache is False."
        raise bad_request(f"{message} Please add `--disable-radix-cache` when you launch the server.")
    if not prompts or not all(prompts):
        raise bad_request("The input is empty.")
    if max(map(len, prompts)) >= config.context:
        message = f"The input ({max(map(len, prompts))} tokens) is longer than the model's context length"
        raise bad_request(f"{message} ({config.context} tokens).")
    return prompts


def _sampling(fields: _Fields, prompts: int) -> _Sampling:
    given = fields.sampling_params
    if isinstance(given, list):
        if len(given) != prompts:
            raise bad_request("The length of sampling_params should be equal to the batch size.")
        if any(one.get("n", 1) != given[0].get("n", 1) for one in given):
            raise bad_request("The parallel_sample_num should be the same for all samples in sample params.")
        if any(one != given[0] for one in given):
            raise bad_request("the simulator samples all prompts of a batch alike")
        given = given[0]
    try:
        return msgspec.convert(given or {}, _Sampling)
    except msgspec.ValidationError as error:
        raise bad_request(f"SamplingParams: {error}") from error


def _each(value: Any, prompt: int) -> Any:
    """A field's value for one prompt of a batch."""
    return value[prompt] if isinstance(value, list) else value


def _logprobs(request: GenerationRequest, sequence: Sequence, tokens: int, weights: int) -> Object:
    """The log-probability members of `meta_info`, after this many tokens."""
    body, prompt = request.body, sequence.index // request.n
    if not _each(body.get("return_logprob"), prompt):
        return {}
    shown = bool(body.get("return_text_in_logprobs"))
    top = _each(body.get("top_logprobs_num"), prompt) or 0
    start = _each(body.get("logprob_start_len"), prompt)
    whole = sequence.tokens[: sequence.prompt_length]
    given: list[tuple[int, int | None]] = []
    if start is not None and start >= 0 and not sequence.transfer.fetches:
        given = list(zip(whole, encoding.prompt_draws(whole, weights), strict=True))[start:]
    said = list(zip(sequence.output[:tokens], (sequence.draws or [])[:tokens], strict=True))

    def entry(token: int, value: float | None) -> list[Any]:
        return [value, token, token_text(token) if shown else None]

    def chosen(pairs: Items[tuple[int, int | None]]) -> list[list[Any]]:
        return [entry(t, None if bits is None else alternatives(bits, t, 1)[0][1]) for t, bits in pairs]

    def likely(pairs: Items[tuple[int, int | None]]) -> list[list[list[Any]] | None]:
        return [
            None if bits is None else [entry(other, value) for other, value in alternatives(bits, t, top)]
            for t, bits in pairs
        ]

    members: Object = {"input_token_logprobs": chosen(given), "output_token_logprobs": chosen(said)}
    if top:
        members |= {"input_top_logprobs": likely(given), "output_top_logprobs": likely(said)}
    return members


def _finish(sequence: Sequence) -> Object:
    if sequence.finish_reason == "length":
        return {"type": "length", "length": sequence.output_length}
    if sequence.finish_reason == "abort":
        return {"type": "abort", "message": "Aborted"}
    return {"type": "stop", "matched": EOS if sequence.stop_reason is None else sequence.stop_reason}


def _rid(request: GenerationRequest, sequence: Sequence) -> str:
    """The request's id as the client sent it, where the request sets one and has no other choices."""
    rid = request.body.get("rid")
    if request.n > 1:
        return sequence.request_id
    if isinstance(rid, list):
        found: str = rid[sequence.index]
        return found
    return f"{request.external_id}_{sequence.index}" if batch_size(request.body) else request.external_id


def partial_answer(
    request: GenerationRequest, sequence: Sequence, text: str, tokens: int, weights: int, *, last: bool
) -> Object:
    """One answer as far as it has come: `tokens` tokens, with `text` as the text of all of them."""
    meta: Object = {
        "id": _rid(request, sequence),
        "finish_reason": _finish(sequence) if last else None,
        "prompt_tokens": sequence.prompt_length,
        "weight_version": "default",
        "num_retractions": 0,
        **_logprobs(request, sequence, tokens, weights),
        "reasoning_tokens": 0,
        "completion_tokens": tokens,
        "cached_tokens": encoding.cached_tokens(sequence),
    }
    if last:
        meta["e2e_latency"] = sequence.last_token_at - sequence.arrived
    return {"text": text, "output_ids": sequence.output[:tokens], "meta_info": meta}


def aborted(request: GenerationRequest, error: RequestError) -> Object:
    """The event of a stream that the engine aborts; it holds the status that an answer would have had."""
    kind = {"type": "abort", "message": error.message, "status_code": error.status, "err_type": error.kind}
    meta = {
        "id": request.external_id,
        "finish_reason": kind,
        "prompt_tokens": len(request.prompts[0]),
        "completion_tokens": 0,
        "cached_tokens": 0,
    }
    return {"text": "", "output_ids": [], "meta_info": meta}


def is_several(request: GenerationRequest) -> bool:
    """Whether the answers come as a list, or with their index in a stream."""
    return request.n > 1 or batch_size(request.body) > 0


def sglang_generate_body(finished: encoding.Finished) -> Any:
    """The whole answer. For a batch, or with several choices, it is a list."""
    request = finished.request
    answers = [
        partial_answer(request, sequence, text, sequence.output_length, finished.weights, last=True)
        for sequence, text in finished.choices()
    ]
    return answers if is_several(request) else answers[0]


def refusal(error: RequestError) -> Object:
    """An error of the handler. The checks before the handler answer as those of every other route."""
    return {"error": {"message": error.message}}
