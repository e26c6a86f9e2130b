"""The gateway's OpenAPI document: FastAPI's description of its routes, the engines' routes, and every error.

This file lists, by their classes, the errors that each operation can end with. Their statuses and codes are those of
`errors/`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from pd_proxy import errors
from pd_proxy.api.schemas import request_content
from pd_proxy.errors import GatewayError
from pd_proxy.flow.single_request import ROUTES
from pd_proxy.requests.endpoints import LAYOUTS

Schema = dict[str, Any]
Kinds = tuple[type[GatewayError], ...]

_ANYWHERE: Kinds = (errors.InvalidRequest, errors.HeadersTooLarge, errors.TooManyConnections)
_BODY: Kinds = (errors.RequestTimedOut, errors.BodyTooLarge, errors.BodiesFull)
_OPERATOR: Kinds = (errors.Unauthorized, errors.Forbidden, errors.BackendNotFound)
_OF_TAG: dict[str, Kinds] = {
    "probes": (errors.NoBackend,),
    "models": (errors.Unauthorized, errors.ModelNotFound, errors.NoBackend),
    "service": (errors.Unauthorized,),
    "responses": (
        errors.Unauthorized,
        errors.ResponseNotFound,
        errors.NoBackend,
        errors.BackendUnreachable,
        errors.BackendCut,
        errors.BackendTimedOut,
    ),
    "metrics": (),
    "administration": (*_OPERATOR, *_BODY),
    "engines": (*_OPERATOR, errors.FanOutFailed),
}
"""The errors of a router's operations, besides `_ANYWHERE`."""

_INFERENCE: Kinds = (
    *_BODY,
    errors.TooManyTokens,
    errors.Unauthorized,
    errors.RouteNotFound,
    errors.ModelNotFound,
    errors.RateLimited,
    errors.NoBackend,
    errors.Draining,
    errors.QueueFull,
    errors.DeadlineTooClose,
    errors.TargetMissed,
    errors.QueueTimedOut,
    errors.TotalTimedOut,
    errors.BackendUnreachable,
    errors.BackendCut,
    errors.BackendGarbled,
    errors.BackendTimedOut,
    errors.BackendLost,
    errors.BackendPreempted,
    errors.BackendAborted,
    errors.BackendStopping,
    errors.HandoffInvalid,
    errors.HandoffExpired,
    errors.EncodingNotSupported,
)

_TEXT = {"type": "string"}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message"],
            "properties": {
                "message": _TEXT,
                "type": {"type": ["string", "null"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
_REPORTED = {"allOf": [{"$ref": "#/components/schemas/Error"}, {"$ref": "#/components/schemas/Report"}]}
_HEADERS = [
    {
        "name": "x-request-id",
        "in": "header",
        "required": False,
        "description": "the request's id, which is returned with the answer and written to the log",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
    },
    {
        "name": "x-request-timeout",
        "in": "header",
        "required": False,
        "description": "seconds that the request may take",
        "schema": {"type": "string", "pattern": r"^[1-9][0-9]{0,5}(\.[0-9]{1,3})?$"},
    },
]
_SUMMARIES = {
    "/v1/chat/completions": "OpenAI's chat completions",
    "/v1/completions": "OpenAI's completions",
    "/v1/messages": "Anthropic's messages",
    "/v1/responses": "OpenAI's responses",
    "/inference/v1/generate": "vLLM's tokens in, tokens out",
    "/generate": "SGLang's generate",
    "/v1/chat/completions/batch": "vLLM's chat completions of several conversations",
    "/v1/chat/completions/render": "A chat's prompt as token ids",
    "/v1/completions/render": "Prompts as token ids",
    "/v1/messages/render": "The same for Anthropic's messages",
    "/v1/responses/render": "The same for OpenAI's responses",
    "/invocations": "Any of the routes here, by the body's members, for SageMaker",
    "/v1/embeddings": "OpenAI's embeddings",
    "/v1/moderations": "OpenAI's moderations",
    "/v1/audio/transcriptions": "OpenAI's transcriptions",
    "/v1/audio/translations": "OpenAI's translations",
    "/v1/messages/count_tokens": "Anthropic's count of a conversation's tokens",
    "/tokenize": "A text's or a conversation's tokens",
    "/detokenize": "The text of tokens",
}
_STREAMED = tuple(layout.path for layout in LAYOUTS.values())


def complete(schema: Schema, engine_routes: Iterable[str]) -> Schema:
    """Complete FastAPI's document, in place, with the engines' routes and all errors.

    Arguments:
        engine_routes: the paths that are not served by FastAPI's router.
    """
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):  # the gateway answers 400, in the shape of all its errors
        schemas.pop(unused, None)
    schemas["Error"] = _ERROR
    components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    for path in schema["paths"].values():
        for operation in path.values():
            _complete(operation)
    for route in engine_routes:
        schema["paths"][route] = {"post": _inference(route)}
    return schema


def _complete(operation: Schema) -> None:
    """Add the errors of one of FastAPI's operations."""
    [tag] = operation["tags"]
    responses = operation["responses"]
    responses.pop("422", None)
    responses |= _responses((*_ANYWHERE, *_OF_TAG[tag]))
    if tag == "responses":
        responses["4XX"] = {"description": "The engine's own refusal.", "content": _json("Error")}
        responses["500"] = {"description": "The engine failed.", "content": _json("Error")}
    if tag == "engines":
        responses["502"]["content"] = {"application/json": {"schema": _REPORTED}}
    if tag not in ("probes", "metrics"):
        operation["security"] = [{"bearer": []}, {}]
    if tag == "engines" and operation.get("deprecated") and not responses["200"].get("content"):
        responses["500"] = {"description": "`reset_failed`", "content": _json("Error")}
        del responses["502"]


def _inference(route: str) -> Schema:
    """The operation of an engine's route."""
    form = route in ROUTES and ROUTES[route].form
    given: Schema = {"application/json": {}}
    if form or route in (*_STREAMED, "/invocations"):
        given["text/event-stream"] = {}
    if form:
        given |= {"text/plain": {}, "text/vtt": {}, "application/x-subrip": {}}
    elif route not in _STREAMED:
        given["application/octet-stream"] = {}
    responses = {"200": {"description": "The engine's answer.", "content": given}}
    responses |= _responses((*_ANYWHERE, *_INFERENCE))
    responses["500"] = {"description": "The engine failed.", "content": _json("Error")}
    responses["501"] = {"description": "The engine cannot do that.", "content": _json("Error")}
    responses["4XX"] = {"description": "The engine's own refusal.", "content": _json("Error")}
    return {
        "tags": ["inference"],
        "operationId": "post" + "".join(c if c.isalnum() else "_" for c in route),
        "summary": _SUMMARIES.get(route, route.rpartition("/")[2].capitalize() + ", as the engines serve it"),
        "description": "The body is the engine's, less the fields of the hand-off; the answer is the engine's too.",
        "parameters": _HEADERS,
        "security": [{"bearer": []}, {}],
        "requestBody": {"required": True, "content": request_content(route)},
        "responses": responses,
    }


def _responses(kinds: Kinds) -> Schema:
    """The error answers of some kinds of error, by status."""
    codes: defaultdict[int, list[str]] = defaultdict(list)
    for kind in kinds:
        codes[kind.status].append(f"`{kind.code}`")
    return {
        str(status): {"description": ", ".join(dict.fromkeys(named)), "content": _json("Error")}
        for status, named in sorted(codes.items())
    }


def _json(schema: str) -> Schema:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
