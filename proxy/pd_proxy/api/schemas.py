"""The requests of the engines' routes, for the OpenAPI document: what clients send most, and what the gateway reads.

Engines take more members than these, and different ones; what the gateway does not know it passes on. So every schema
is open, and none has a bound that is the engine's to keep.
"""

from __future__ import annotations

from typing import Any

from pd_proxy.flow.single_request import ROUTES

Schema = dict[str, Any]


def _of(kind: str | list[str], about: str, **more: Any) -> Schema:
    return {"type": kind, "description": about, **more}


def _list(items: Schema, about: str) -> Schema:
    return {"type": "array", "items": items, "description": about}


_TEXT: Schema = {"type": "string"}
_WHOLE: Schema = {"type": "integer"}
_MODEL = {"model": _of("string", "The model, by its own name or an alias. May be left out where there is one model.")}
_STREAM = {"stream": _of(["boolean", "null"], "Answer with server-sent events.")}
_OPTIONS = {
    "stream_options": {
        "type": ["object", "null"],
        "description": "Of streams.",
        "properties": {
            "include_usage": _of("boolean", "An event with the usage at the end."),
            "continuous_usage_stats": _of("boolean", "vLLM's: usage with every event."),
        },
        "additionalProperties": True,
    }
}
_SAMPLING = {
    "temperature": _of(["number", "null"], "0 takes the likeliest token each time."),
    "top_p": _of(["number", "null"], "The share of probability that tokens are drawn from."),
    "seed": _of(["integer", "null"], "Of the draws."),
    "stop": {
        "description": "Texts at which the answer ends.",
        "anyOf": [_TEXT, {"type": "array", "items": _TEXT}, {"type": "null"}],
    },
}
_SEVERAL = {"n": _of(["integer", "null"], "Answers. More than one are not split between prefill and decode.")}
_LEAST = {"min_tokens": _of(["integer", "null"], "vLLM's: tokens of the answer, at least.")}
_IDS = {"return_token_ids": _of(["boolean", "null"], "vLLM's: the token ids of prompt and answer.")}
_CHAT_MESSAGE = {
    "type": "object",
    "properties": {
        "role": _of("string", "`system`, `user`, `assistant` or `tool`."),
        "content": {
            "description": "Text, or parts: text, image_url, input_audio, video_url.",
            "anyOf": [
                _TEXT,
                {"type": "array", "items": {"type": "object", "additionalProperties": True}},
                {"type": "null"},
            ],
        },
    },
    "additionalProperties": True,
}
_TOOLS = {
    "tools": _list({"type": "object", "additionalProperties": True}, "Functions that the model may call."),
    "tool_choice": {
        "description": "`auto`, `none`, `required`, or one of the tools.",
        "anyOf": [_TEXT, {"type": "object", "additionalProperties": True}, {"type": "null"}],
    },
}
_LOGPROBS = {
    "logprobs": _of(["boolean", "null"], "Log probabilities of the answer's tokens."),
    "top_logprobs": _of(["integer", "null"], "... and of so many others at each place."),
}
_ASK = [{"role": "user", "content": "What does a decode node do?"}]
_INPUT = {
    "description": "One text or several, as text or as token ids.",
    "anyOf": [
        _TEXT,
        {"type": "array", "items": _TEXT},
        {"type": "array", "items": _WHOLE},
        {"type": "array", "items": {"type": "array", "items": _WHOLE}},
    ],
}


def _body(example: dict[str, Any], required: tuple[str, ...], *members: Schema) -> Schema:
    properties: Schema = {}
    for some in members:
        properties |= some
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": True,
        "examples": [example],
    }


_CHAT = (
    _MODEL,
    {"messages": _list(_CHAT_MESSAGE, "The conversation so far.")},
    {
        "max_completion_tokens": _of(["integer", "null"], "Tokens of the answer, at most."),
        "max_tokens": _of(["integer", "null"], "The same by its older name."),
    },
    _STREAM,
    _OPTIONS,
    _SAMPLING,
    _SEVERAL,
    _TOOLS,
    {"response_format": _of(["object", "null"], "`json_schema` and its like.", additionalProperties=True)},
    _LOGPROBS,
    _LEAST,
    _IDS,
)
_COMPLETION = (
    _MODEL,
    {
        "prompt": _INPUT,
        "max_tokens": _of(["integer", "null"], "Tokens of the answer, at most; 16 where it is not said."),
    },
    _STREAM,
    _OPTIONS,
    _SAMPLING,
    _SEVERAL,
    {
        "logprobs": _of(["integer", "null"], "Log probabilities of so many tokens at each place."),
        "echo": _of(["boolean", "null"], "The prompt too. Not split between prefill and decode."),
    },
    _LEAST,
    _IDS,
)
_MESSAGES = (
    _MODEL,
    {
        "messages": _list(_CHAT_MESSAGE, "The conversation so far."),
        "max_tokens": _of("integer", "Tokens of the answer, at most."),
        "system": {"description": "What stands before it.", "anyOf": [_TEXT, {"type": "array"}]},
        "stop_sequences": _list(_TEXT, "Texts at which the answer ends."),
        "temperature": _SAMPLING["temperature"],
        "top_p": _SAMPLING["top_p"],
        "top_k": _of(["integer", "null"], "Tokens that are drawn from."),
    },
    _STREAM,
    _TOOLS,
)
_RESPONSE = (
    _MODEL,
    {
        "input": {"description": "Text, or items.", "anyOf": [_TEXT, {"type": "array"}]},
        "instructions": _of(["string", "null"], "What stands before it."),
        "max_output_tokens": _of(["integer", "null"], "Tokens of the answer, at most."),
        "previous_response_id": _of(["string", "null"], "The stored response that it goes on from."),
        "store": _of(["boolean", "null"], "Whether the engine keeps the answer."),
        "background": _of(["boolean", "null"], "Answer at once, and go on."),
        "temperature": _SAMPLING["temperature"],
        "top_p": _SAMPLING["top_p"],
    },
    _STREAM,
    _TOOLS,
)
_EMBED = (
    _MODEL,
    {
        "input": _INPUT,
        "encoding_format": _of("string", "`float`, `base64`, or vLLM's `bytes`."),
        "dimensions": _of(["integer", "null"], "Of each vector, where the model can."),
    },
)
_RERANK = (
    _MODEL,
    {
        "query": {"description": "What is looked for."},
        "documents": {"type": "array", "items": {}, "description": "What is ranked."},
        "top_n": _of(["integer", "null"], "Documents that are wanted."),
    },
)
_SCORE = (
    _MODEL,
    {"text_1": {"description": "One text or several."}, "text_2": {"description": "One text or several."}},
)

_CHAT_EXAMPLE = {"model": "my-model", "messages": _ASK, "max_completion_tokens": 64, "stream": True}
_COMPLETION_EXAMPLE = {"model": "my-model", "prompt": "A decode node", "max_tokens": 64}
_MESSAGES_EXAMPLE = {"model": "my-model", "max_tokens": 64, "messages": _ASK}
_RESPONSE_EXAMPLE = {"model": "my-model", "input": "What does a decode node do?", "max_output_tokens": 64}
_EMBED_EXAMPLE = {"model": "my-model", "input": ["one text", "another"]}
_RERANK_EXAMPLE = {"model": "my-model", "query": "decode", "documents": ["one text", "another"]}
_SCORE_EXAMPLE = {"model": "my-model", "text_1": "decode", "text_2": ["one text", "another"]}

_BODIES: dict[str, Schema] = {
    "/v1/chat/completions": _body(_CHAT_EXAMPLE, ("messages",), *_CHAT),
    "/v1/chat/completions/render": _body(_CHAT_EXAMPLE, ("messages",), *_CHAT),
    "/v1/chat/completions/batch": _body(
        {"model": "my-model", "messages": [_ASK, _ASK], "max_completion_tokens": 64},
        ("messages",),
        *_CHAT,
        {"messages": _list(_list(_CHAT_MESSAGE, "One conversation."), "Conversations, each answered by itself.")},
    ),
    "/v1/completions": _body(_COMPLETION_EXAMPLE, ("prompt",), *_COMPLETION),
    "/v1/completions/render": _body(_COMPLETION_EXAMPLE, ("prompt",), *_COMPLETION),
    "/v1/messages": _body(_MESSAGES_EXAMPLE, ("messages", "max_tokens"), *_MESSAGES),
    "/v1/messages/render": _body(_MESSAGES_EXAMPLE, ("messages", "max_tokens"), *_MESSAGES),
    "/v1/messages/count_tokens": _body({"model": "my-model", "messages": _ASK}, ("messages",), *_MESSAGES),
    "/v1/responses": _body(_RESPONSE_EXAMPLE, ("input",), *_RESPONSE),
    "/v1/responses/render": _body(_RESPONSE_EXAMPLE, ("input",), *_RESPONSE),
    "/inference/v1/generate": _body(
        {"model": "my-model", "token_ids": [9906, 1917], "sampling_params": {"max_tokens": 64}},
        ("token_ids",),
        _MODEL,
        {
            "token_ids": _list(_WHOLE, "The prompt."),
            "sampling_params": _of(
                "object",
                "As vLLM's SamplingParams.",
                properties={"max_tokens": _of(["integer", "null"], "Tokens of the answer, at most."), **_SEVERAL},
                additionalProperties=True,
            ),
        },
        _STREAM,
        _OPTIONS,
        _IDS,
    ),
    "/generate": _body(
        {"text": "A decode node", "sampling_params": {"max_new_tokens": 64}},
        (),
        {
            "text": {"description": "The prompt, or several.", "anyOf": [_TEXT, {"type": "array", "items": _TEXT}]},
            "input_ids": {"type": "array", "description": "The prompt as token ids, in place of `text`."},
            "sampling_params": {
                "description": "SGLang's, `max_new_tokens` among them; a list for several prompts.",
                "anyOf": [{"type": "object", "additionalProperties": True}, {"type": "array"}],
            },
        },
        _STREAM,
    ),
    "/v1/embeddings": _body(_EMBED_EXAMPLE, ("input",), *_EMBED),
    "/pooling": _body(_EMBED_EXAMPLE, ("input",), *_EMBED),
    "/classify": _body(_EMBED_EXAMPLE, ("input",), _MODEL, {"input": _INPUT}),
    "/v1/moderations": _body(_EMBED_EXAMPLE, ("input",), _MODEL, {"input": _INPUT}),
    **{
        path: _body(_RERANK_EXAMPLE, ("query", "documents"), *_RERANK)
        for path in ("/v1/rerank", "/v2/rerank", "/rerank")
    },
    **{path: _body(_SCORE_EXAMPLE, (), *_SCORE) for path in ("/v1/score", "/score")},
    "/tokenize": _body(
        {"model": "my-model", "prompt": "A decode node"},
        (),
        _MODEL,
        {"prompt": _of("string", "A text."), "messages": _list(_CHAT_MESSAGE, "Or a conversation.")},
    ),
    "/detokenize": _body(
        {"model": "my-model", "tokens": [9906, 1917]}, ("tokens",), _MODEL, {"tokens": _list(_WHOLE, "Token ids.")}
    ),
    "/invocations": _body(
        _CHAT_EXAMPLE, (), _MODEL, {"messages": _of("array", "A chat's; other members lead elsewhere.")}
    ),
}

_FORM: Schema = {
    "type": "object",
    "required": ["file"],
    "properties": {
        **_MODEL,
        "file": _of("string", "The audio.", format="binary"),
        "stream": _of("boolean", "Answer with server-sent events."),
        "language": _of("string", "Of the audio, as `en`."),
        "prompt": _of("string", "What came before."),
        "response_format": _of("string", "`json`, `text`, `srt`, `verbose_json` or `vtt`."),
        "temperature": _of("number", "0 takes the likeliest token each time."),
    },
    "additionalProperties": True,
}


def request_content(route: str) -> Schema:
    """What a route takes, as OpenAPI's `content` of a request body."""
    if route in ROUTES and ROUTES[route].form:
        return {"multipart/form-data": {"schema": _FORM}}
    return {"application/json": {"schema": _BODIES[route]}}
