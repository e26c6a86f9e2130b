"""TensorRT-LLM, context first: the context server computes the prompt and the first token. It answers with what the
generation server needs to fetch the KV cache and continue (`disaggregated_params`, in the answer's only choice).

The context leg has the client's whole body. Its engine stops after the context phase by itself, and the token that it
samples is the client's first. Where the answer ended for another reason than its length, it is the whole answer
(`whole`). Names are those of `tensorrt_llm/serve/openai_disagg_service.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Annotated, Any

import msgspec

from pd_proxy.decoding import Undecodable, WrongShape, decode_members, decode_objects, json_decoder
from pd_proxy.encoding import encode_json
from pd_proxy.errors import BackendGarbled, HandoffInvalid
from pd_proxy.handoff.answer import PrefillAnswer
from pd_proxy.handoff.connector import Connector, Handoff, Rendezvous, in_one_piece
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.first_token import FirstToken
from pd_proxy.handoff.traits import Traits
from pd_proxy.requests.endpoints import Endpoint, Members

_GOES_ON = ("length", "not_finished")
_CONTEXT_FIRST = 0
_LEAST_ID = 1 << 62  # far above the ids that engines assign themselves


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    """The choice of a context server's answer, as far as it is read."""

    finish_reason: str | None = None
    message: _Message | None = None
    text: str | None = None
    disaggregated_params: msgspec.Raw = msgspec.Raw(b"null")


class _Params(msgspec.Struct):
    """The parameters that a generation server requires. Others are passed on unchanged."""

    ctx_request_id: int
    disagg_request_id: int
    first_gen_tokens: list[int]
    encoded_opaque_state: str | None = None
    ctx_info_endpoint: str | list[str] | None = None


_decode_choices = json_decoder(list[_Choice])
_decode_params = json_decoder(_Params)
_decode_ids = json_decoder(list[int] | None)
_decode_lists = json_decoder(Annotated[list[list[int]], msgspec.Meta(min_length=1, max_length=1)])


class TensorRTLLM(Connector):
    """trtllm-serve's context and generation servers.

    Arguments:
        key: the key that signs hand-offs, where the generation servers require a signature; else empty.
    """

    traits = Traits(
        name="tensorrt_llm",
        fingerprints=frozenset({"tensorrt_llm"}),
        negotiates=True,
        lease=60.0,  # the default of kv_transfer_timeout_ms; older engines have none and keep the blocks for ever
        resumable=False,
        plain_prefill=False,
        endpoints=frozenset({"chat", "completions"}),
    )

    def __init__(self, key: str = "") -> None:
        self._key = key.encode()

    def prefill(self, members: Members, endpoint: Endpoint, *, token: bool = False) -> Members:
        return in_one_piece(members)

    def negotiate(self, prefill: Coordinates, decode: Coordinates, name: str, rank: int | None) -> Rendezvous:
        for_prefill = {
            "request_type": "context_only",
            "disagg_request_id": _LEAST_ID | int(name[-16:], 16) >> 2,
            "schedule_style": _CONTEXT_FIRST,
        }
        return Rendezvous({"disaggregated_params": msgspec.Raw(encode_json(for_prefill))})

    def take(self, answer: PrefillAnswer) -> Handoff | None:
        try:
            choices = _decode_choices(answer.choices)
        except Undecodable as error:
            raise HandoffInvalid(f"the context server's choices are not usable: {error}") from None
        if len(choices) != 1:
            raise HandoffInvalid(f"the context server has answered with {len(choices)} choices")
        choice = choices[0]
        if choice.finish_reason not in _GOES_ON and choice.finish_reason is not None:
            return None
        params = choice.disaggregated_params
        try:
            checked = _decode_params(params)
            for_decode = {
                **decode_members(params),
                "request_type": msgspec.Raw(b'"generation_only"'),
                "schedule_style": msgspec.Raw(b"%d" % _CONTEXT_FIRST),
            }
            _check_ids(answer.prompt_token_ids)
        except Undecodable as error:
            raise HandoffInvalid(f"the context server's disaggregated_params are not usable: {error}") from None
        if not checked.first_gen_tokens:
            raise HandoffInvalid("the context server's disaggregated_params have no first token")
        if _given(answer.usage):
            for_decode["ctx_usage"] = answer.usage
        members = {"disaggregated_params": msgspec.Raw(encode_json(for_decode))}
        if _given(answer.prompt_token_ids_b64):
            members["prompt_token_ids_b64"] = answer.prompt_token_ids_b64
        elif _given(answer.prompt_token_ids):
            members["prompt_token_ids"] = answer.prompt_token_ids
        return Handoff(members, self._signed(checked))

    def decode(self, members: Members, handoff: Handoff) -> Members:
        own = dict(handoff.members)
        ids = own.pop("prompt_token_ids", None)
        leg = {**members, **own}
        if ids is not None:  # the prompt as the context server tokenised it
            leg["prompt" if "prompt" in members else "prompt_token_ids"] = ids
        return leg

    def whole(self, answer: PrefillAnswer) -> FirstToken | None:
        try:
            checked = _decode_choices(answer.choices)
            _check_ids(answer.prompt_token_ids)
        except Undecodable:
            return None  # `take` reports the error
        if len(checked) != 1 or checked[0].finish_reason in (None, *_GOES_ON):
            return None
        if missing := answer.lacks():
            raise BackendGarbled(f"the context server's answer has no {missing}")
        members = decode_members(answer.body)
        if not _given(answer.usage):
            members.pop("usage", None)
        members.pop("prompt_token_ids_b64", None)
        [raw_choice] = decode_objects(answer.choices)
        choice = {name: value for name, value in raw_choice.items() if name != "disaggregated_params"}
        message = checked[0].message
        text = (checked[0].text if message is None else message.content) or ""
        ids = bytes(answer.prompt_token_ids).strip(b"[]") if _given(answer.prompt_token_ids) else b""
        return FirstToken(answer, choice, ids, b"", text, whole=True, engine="", members=members)

    def _signed(self, params: _Params) -> bytes:
        """The header with the signature, by which a generation server verifies that the parameters come from a
        gateway."""
        if not self._key or params.encoded_opaque_state is params.ctx_info_endpoint is None:
            return b""
        endpoint: Any = params.ctx_info_endpoint
        if isinstance(endpoint, list):
            endpoint = endpoint[0] if endpoint else None
        signed = {"ctx_info_endpoint": endpoint, "encoded_opaque_state": params.encoded_opaque_state}
        canonical = json.dumps(signed, sort_keys=True, separators=(",", ":")).encode()
        return (
            b"x-trtllm-disagg-auth: sha256=%b\r\n" % hmac.new(self._key, canonical, hashlib.sha256).hexdigest().encode()
        )


def _given(raw: msgspec.Raw) -> bool:
    return bytes(memoryview(raw)[:4]) not in (b"", b"null")


def _check_ids(raw: msgspec.Raw) -> None:
    """Check that these are the ids of one prompt, or absent. Completions have them in a list with one element.

    Raises:
        WrongShape: they are neither.
    """
    if not _given(raw):
        return
    try:
        _decode_ids(raw)
    except WrongShape:
        _decode_lists(raw)
