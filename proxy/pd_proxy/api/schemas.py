"""The request bodies of the engines' routes, for the OpenAPI document: the usual members, and those the gateway reads.

Engines take more members than these, and different ones; the gateway forwards members that it does not know. So every
schema allows additional members, and none has a bound that the engine checks.
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
        "description": "Options of streams.",
        "properties": {
            "include_usage": _of("boolean", "Send an event with the usage at the end."),
            "continuous_usage_stats": _of("boolean", "vLLM's: send the usage with every event."),
        },
        "additionalProperties": True,
    }
}
_SAMPLING = {
    "temperature": _of(["number", "null"], "The sampling temperature; 0 always takes the likeliest token."),
    "top_p": _of(["number", "null"], "Sample only from the likeliest tokens, up to this share of probability."),
    "seed": _of(["integer", "null"], "The seed of the sampling."),
    "stop": {
        "description": "Texts at which the answer ends.",
        "anyOf": [_TEXT, {"type": "array", "items": _TEXT}, {"type": "null"}],
    },
}
_SEVERAL = {"n": _of(["integer", "null"], "The number of answers. Requests for several are not split between engines.")}
_LEAST = {"min_tokens": _of(["integer", "null"], "vLLM's: the least number of tokens of the answer.")}
_IDS = {"return_token_ids": _of(["boolean", "null"], "vLLM's: return the token ids of prompt and answer.")}
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
    "logprobs": _of(["boolean", "null"], "Return the log probabilities of the answer's tokens."),
    "top_logprobs": _of(["integer", "null"], "Return those of so many alternatives at each position too."),
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
        "max_completion_tokens": _of(["integer", "null"], "The most tokens that the answer may have."),
        "max_tokens": _of(["integer", "null"], "The older name of `max_completion_tokens`."),
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
        "max_tokens": _of(["integer", "null"], "The most tokens that the answer may have; 16 by default."),
    },
    _STREAM,
    _OPTIONS,
    _SAMPLING,
    _SEVERAL,
    {
        "logprobs": _of(["integer", "null"], "Return the log probabilities of so many tokens at each position."),
        "echo": _of(["boolean", "null"], "Return the prompt too. Such requests are not split between engines."),
    },
    _LEAST,
    _IDS,
)
_MESSAGES = (
    _MODEL,
    {
        "messages": _list(_CHAT_MESSAGE, "The conversation so far."),
        "max_tokens": _of("integer", "The most tokens that the answer may have."),
        "system": {"description": "The system prompt.", "anyOf": [_TEXT, {"type": "array"}]},
        "stop_sequences": _list(_TEXT, "Texts at which the answer ends."),
        "temperature": _SAMPLING["temperature"],
        "top_p": _SAMPLING["top_p"],
        "top_k": _of(["integer", "null"], "Sample only from so many of the likeliest tokens."),
    },
    _STREAM,
    _TOOLS,
)
_RESPONSE = (
    _MODEL,
    {
        "input": {"description": "Text, or items.", "anyOf": [_TEXT, {"type": "array"}]},
        "instructions": _of(["string", "null"], "The system prompt."),
        "max_output_tokens": _of(["integer", "null"], "The most tokens that the answer may have."),
        "previous_response_id": _of(["string", "null"], "The id of the stored response that this request continues."),
        "store": _of(["boolean", "null"], "Store the answer at the engine."),
        "background": _of(["boolean", "null"], "Return at once, and generate the answer in the background."),
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
        "dimensions": _of(["integer", "null"], "The length of each vector, where the model supports a choice."),
    },
)
_RERANK = (
    _MODEL,
    {
        "query": {"description": "The query that the documents are ranked by."},
        "documents": {"type": "array", "items": {}, "description": "The documents to rank."},
        "top_n": _of(["integer", "null"], "The number of documents to return."),
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
        {"messages": _list(_list(_CHAT_MESSAGE, "One conversation."), "Conversations; each gets its own answer.")},
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
                "vLLM's SamplingParams.",
                properties={
                    "max_tokens": _of(["integer", "null"], "The most tokens that the answer may have."),
                    **_SEVERAL,
                },
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
            "input_ids": {"type": "array", "description": "The prompt as token ids, instead of `text`."},
            "sampling_params": {
                "description": "SGLang's sampling parameters, with `max_new_tokens`; a list for several prompts.",
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
        {
            "prompt": _of("string", "A text."),
            "messages": _list(_CHAT_MESSAGE, "A conversation, instead of `prompt`."),
        },
    ),
    "/detokenize": _body(
        {"model": "my-model", "tokens": [9906, 1917]}, ("tokens",), _MODEL, {"tokens": _list(_WHOLE, "Token ids.")}
    ),
    "/invocations": _body(
        _CHAT_EXAMPLE, (), _MODEL, {"messages": _of("array", "A chat; other members choose other routes.")}
    ),
}

_FORM: Schema = {
    "type": "object",
    "required": ["file"],
    "properties": {
        **_MODEL,
        "file": _of("string", "The audio.", format="binary"),
        "stream": _of("boolean", "Answer with server-sent events."),
        "language": _of("string", "The language of the audio, such as `en`."),
        "prompt": _of("string", "The text before the audio."),
        "response_format": _of("string", "`json`, `text`, `srt`, `verbose_json` or `vtt`."),
        "temperature": _of("number", "The sampling temperature; 0 always takes the likeliest token."),
    },
    "additionalProperties": True,
}


def request_content(route: str) -> Schema:
    """The request body of a route, as OpenAPI's `content`."""
    if route in ROUTES and ROUTES[route].form:
        return {"multipart/form-data": {"schema": _FORM}}
    return {"application/json": {"schema": _BODIES[route]}}
