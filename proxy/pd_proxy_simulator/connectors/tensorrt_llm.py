"""TensorRT-LLM, context first: a request's `disaggregated_params` say which phase it is.

A context server stops after the context phase, whatever `max_tokens` says. Its choice holds what the generation phase
needs: the request's id, its first token, and an opaque state with the KV's address. A generation server fetches the KV
of exactly that prompt and continues after exactly that token. KV is kept for one lease, and deleted when it is fetched.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pd_proxy.decoding import decode_python_json

from pd_proxy_simulator.connectors.side import Side
from pd_proxy_simulator.errors import RequestError
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.transfers import Transfer

_FIRST = 0
"""The value of `schedule_style` for context first."""


@dataclass(frozen=True, slots=True)
class _Context:
    """What a generation request holds of its context phase."""

    name: str
    host: str
    port: int
    engine_id: str
    first: int
    draw: int


class TensorRTLLM(Side):
    """Context and generation servers of trtllm-serve."""

    kept_after = ("length",)

    def transfer(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Transfer:
        params = body.get("disaggregated_params")
        if params is None:
            return Transfer()
        if not isinstance(params, dict):
            raise _bad("disaggregated_params: Input should be a valid dictionary")
        if (body.get("n") or 1) != 1:
            raise _bad("disaggregated requests have one choice")
        match params.get("request_type"):
            case "context_only":
                if type(params.get("disagg_request_id")) is not int or params.get("schedule_style") != _FIRST:
                    raise _bad("a context_only request needs disagg_request_id and schedule_style 0")
                if body.get("stream"):
                    raise _bad("a context_only request cannot be streamed: nobody would hear its disaggregated_params")
                return Transfer("prefill", params)
            case "generation_only":
                self._authenticate(params, headers)
                return Transfer("decode", _context(params))
            case "context_and_generation":
                return Transfer()
            case kind:
                raise _bad(f"Unknown request type: {kind!r}")

    def describe(self, path: str) -> dict[str, Any] | None:
        """A context server describes how its cache is reached; a generation server answers with an empty object."""
        if path != "/server_info":
            return None
        config = self.engine.config
        reached = {"ctx_info_endpoint": [f"tcp://{config.advertised_host}:{self.engine.side_port}"], "ctx_dp_rank": 0}
        return {"disaggregated_params": reached if config.role == "prefill" else None}

    def _authenticate(self, params: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        key = self.engine.config.handoff_key
        if key is None:
            return
        named = {name: params.get(name) for name in ("ctx_info_endpoint", "encoded_opaque_state")}
        text = json.dumps(named, sort_keys=True, separators=(",", ":"))
        wanted = "sha256=" + hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()
        if not hmac.compare_digest(headers.get("x-trtllm-disagg-auth", ""), wanted):
            raise _bad("Invalid internal disaggregated request authentication")

    def read(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        ids = body.get("prompt_token_ids")
        if (packed := body.get("prompt_token_ids_b64")) is not None:
            raw = base64.b64decode(packed)
            ids = list(struct.unpack(f"<{len(raw) // 4}i", raw))
        if ids is None:
            return body
        return {**body, "kv_transfer_params": {"prompt_token_ids": ids}}

    def error_body(self, error: RequestError) -> dict[str, object]:
        said = {"message": error.message, "type": error.kind, "param": error.param, "code": error.status}
        return {"object": "error", **said}

    # The context phase

    def submitted(self, sequence: Sequence) -> None:
        if sequence.transfer.keeps:
            sequence.sampling = replace(sequence.sampling, max_tokens=1)

    def key(self, sequence: Sequence) -> str:
        return str(sequence.transfer.params["disagg_request_id"])

    def kept(self, sequence: Sequence, tokens: int) -> dict[str, Any]:
        engine = self.engine
        state = {"host": engine.config.advertised_host, "port": engine.side_port, "engine": engine.id}
        return {
            "request_type": "context_only",
            "first_gen_tokens": [sequence.tokens[-1]],
            "first_gen_log_probs": None if sequence.draws is None else [sequence.draws[-1]],
            "ctx_request_id": int(self.key(sequence)),
            "encoded_opaque_state": base64.b64encode(json.dumps(state).encode()).decode(),
            "draft_tokens": None,
            "disagg_request_id": int(self.key(sequence)),
            "ctx_dp_rank": None,
            "ctx_info_endpoint": None,
            "schedule_style": _FIRST,
            "prompt": sequence.tokens[: sequence.prompt_length],
        }

    def answer(self, body: dict[str, Any]) -> None:
        params = body.pop("kv_transfer_params", None)
        given = dict(params) if params is not None else None
        prompt = None if given is None else given.pop("prompt")
        for choice in body.get("choices", ()):
            choice["disaggregated_params"] = given
        if prompt is not None:
            body["prompt_token_ids"] = prompt if body["object"] == "chat.completion" else [prompt]

    # The generation phase

    def load(self, sequence: Sequence) -> None:
        context: _Context = sequence.transfer.params
        sequence.given = (context.first, context.draw)
        cached = sequence.cached // self.engine.config.block_size
        tokens = sequence.prompt_length - sequence.cached
        wait = self.engine.peers.wait(context.host, context.port, context.engine_id, context.name, cached, tokens)
        self.engine.fetch(sequence, wait)

    def release_unread(self, transfer: Transfer) -> None:
        """A context server is not notified; it releases the KV when the lease ends."""


def _context(params: Mapping[str, Any]) -> _Context:
    name, first, state = (params.get(key) for key in ("ctx_request_id", "first_gen_tokens", "encoded_opaque_state"))
    if type(name) is not int or params.get("disagg_request_id") != name:
        raise RequestError(500, "InternalServerError", "generation_only: ctx_request_id is not known")
    if not (isinstance(first, list) and first and all(type(token) is int for token in first)):
        raise RequestError(500, "InternalServerError", "generation_only: first_gen_tokens are missing")
    if params.get("schedule_style") != _FIRST or not isinstance(params.get("ctx_usage"), dict):
        raise _bad("generation_only: schedule_style or ctx_usage is missing")
    draws = params.get("first_gen_log_probs") or [0]
    try:
        way = decode_python_json(base64.b64decode(str(state), validate=True))
        return _Context(str(name), way["host"], way["port"], way["engine"], first[0], draws[0])
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(500, "InternalServerError", f"generation_only: encoded_opaque_state: {error}") from error


def _bad(message: str) -> RequestError:
    return RequestError(400, "BadRequestError", message)
