"""The fields of request bodies and their types. Errors are worded as pydantic words them.

Invariant: fields that are not named here are ignored, as in vLLM; those that are named have the right type after
decoding.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from pd_proxy_simulator.errors import invalid_field

Object = dict[str, Any]


class StreamOptions(msgspec.Struct):
    """`stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CommonFields(msgspec.Struct):
    """The fields of both endpoints. Unknown ones are ignored, as in vLLM."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    user: str | None = None
    response_format: Object | None = None
    structured_outputs: Object | None = None
    kv_transfer_params: Object | None = None
    ec_transfer_params: Object | None = None
    echo: bool | None = None


class ChatFields(CommonFields):
    """`POST /v1/chat/completions`."""

    messages: list[Object] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Object] | None = None
    tool_choice: str | Object | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class CompletionFields(CommonFields):
    """`POST /v1/completions`."""

    prompt: Any = None
    logprobs: int | None = None
    suffix: str | None = None


_PYDANTIC = {
    "int": ("int_parsing", "Input should be a valid integer"),
    "float": ("float_parsing", "Input should be a valid number"),
    "bool": ("bool_parsing", "Input should be a valid boolean"),
    "str": ("string_type", "Input should be a valid string"),
    "object": ("dict_type", "Input should be a valid dictionary"),
    "array": ("list_type", "Input should be a valid list"),
}
_WRONG = re.compile(r"Expected `([^`]*)`.*? - at `\$\.?([^`\[]*)(.*)`")


_Fields = TypeVar("_Fields", bound=msgspec.Struct)


def decode_fields(body: Any, fields: type[_Fields]) -> _Fields:
    """A body as typed fields. Raises RequestError."""
    if not isinstance(body, dict):
        raise invalid_field("", "model_attributes_type", "Input should be a valid dictionary or object", body)
    try:
        return msgspec.convert(body, fields, strict=False)
    except msgspec.ValidationError as error:
        found = _WRONG.search(str(error))
        if found is None:
            raise invalid_field("", "value_error", str(error).replace("'", ""), None) from error
        expected = found[1].split(" | ")[0]
        kind, message = _PYDANTIC.get(expected, ("value_error", f"Input should be a valid {expected}"))
        name = found[2].split(".")[0]
        raise invalid_field(name, kind, message, body.get(name)) from error
