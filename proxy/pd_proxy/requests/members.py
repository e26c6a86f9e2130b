"""The members of a request body: read at the top level, bounded, and without those that clients may not send to
engines."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from pd_proxy.decoding import Undecodable, WrongShape, decode_json
from pd_proxy.encoding import encode_json
from pd_proxy.errors import InvalidRequest
from pd_proxy.requests import json_scan as scan
from pd_proxy.requests.endpoints import Members

FORBIDDEN = frozenset(
    {
        # vLLM, its connectors, and vllm-ascend
        "kv_transfer_params",
        "ec_transfer_params",
        "batch_kv_transfer_params",
        "kv_cache_report_mode",
        "hidden_states_path",
        "request_id",
        # SGLang
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "bootstrap_pair_key",
        "rid",
        "routed_dp_rank",
        "data_parallel_rank",
        "disagg_prefill_dp_rank",
        "decode_tp_size",
        # TensorRT-LLM
        "disaggregated_params",
    }
)
"""Members by which engines find each other's memory. A client that could set them could make an engine connect to any
address, read another user's KV cache, or crash."""

NESTED = ("vllm_xargs", "extra_args", "sampling_params")
"""Members that an engine merges into its own arguments. The forbidden names are removed inside them too."""

_STRIPPED = FORBIDDEN.union(NESTED)

_KB, _MB = 1024, 1024 * 1024
_MOST_BYTES = {
    # A name, a number or a few flags, which the gateway reads.
    **dict.fromkeys(("model", "previous_response_id", "stream", "stream_options", "store", "background"), 8 * _KB),
    **dict.fromkeys(("n", "max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens"), 8 * _KB),
    **dict.fromkeys(("return_token_ids", "truncation"), 8 * _KB),
    # OpenAI accepts 16 pairs of 64 and 512 characters, and 4 stop strings; engines accept more.
    **dict.fromkeys(("metadata", "stop", "stop_sequences", "tool_choice", "return_logprob"), 256 * _KB),
    # They may contain a whole vocabulary: 256,000 tokens of 7 bytes, or of 14 bytes with a number for each.
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids", "bad_words", *NESTED), 4 * _MB),
    **dict.fromkeys(("logit_bias", "tools", "response_format", "structured_outputs"), 8 * _MB),
}
"""The most bytes of members that are short by nature. All others are bounded only by `limits.request_body`."""

_LONG = 64 * _KB  # bytes of a body from which the sizes of its members are checked
_MOST_STRIPPED = 64 * _KB  # bytes of a member in `NESTED` up to which forbidden names are removed from it
_BOM = b"\xef\xbb\xbf"


def read_members(raw: bytes | bytearray) -> Members:
    """The members of a JSON request without the forbidden ones.

    Raises:
        InvalidRequest: the body is not a JSON object, or exceeds a bound.
    """
    if raw[:3] == _BOM:  # not allowed in JSON, but editors on Windows write it and engines accept it
        raw = raw[len(_BOM) :]
    try:
        members = scan.members(raw)
    except scan.TooMany:
        raise InvalidRequest(f"the request body has more than {scan.MOST_MEMBERS} members") from None
    except WrongShape:
        raise InvalidRequest("the request body must be a JSON object") from None
    except Undecodable as error:
        if not raw or raw.isspace():
            raise InvalidRequest("the request body is empty; it must be a JSON object") from None
        raise InvalidRequest(f"the request body is not valid JSON: {error}") from None
    if len(raw) > _LONG:
        check_sizes(members)
    if not _STRIPPED.isdisjoint(members):
        for name in FORBIDDEN.intersection(members):
            del members[name]
        for name in NESTED:
            if name in members:
                members[name] = msgspec.Raw(strip_nested(name, members[name]))
    return members


def check_sizes(members: Members) -> None:
    """Check the lengths of the members that are short by nature.

    Raises:
        InvalidRequest: one is too long.
    """
    for name, value in members.items():
        most = _MOST_BYTES.get(name)
        if most is not None and len(memoryview(value)) > most:
            raise InvalidRequest(f"`{name}` is longer than {most} bytes", param=name)


_WORDS = tuple(map(str.encode, sorted(FORBIDDEN)))
_LETTER_ESCAPED = re.compile(rb"\\u00(?:5f|6[1-9a-f]|7[0-9a])", re.IGNORECASE)
"""An escaped letter or underscore. The forbidden names consist of these, and no encoder escapes them."""


def strip_nested(name: str, raw: bytes | bytearray | msgspec.Raw) -> bytes | msgspec.Raw:
    """The value of a member in `NESTED` without the forbidden names, at any depth.

    Raises:
        InvalidRequest: the value is not JSON; or it contains a forbidden name and is too long to remove it.
    """
    text = bytes(raw)
    if len(text) > _MOST_STRIPPED and not any(word in text for word in _WORDS) and not _LETTER_ESCAPED.search(text):
        return raw if isinstance(raw, msgspec.Raw) else text
    if len(text) > _MOST_STRIPPED:
        raise InvalidRequest(
            f"`{name}` has names in it that no client may use, and is longer than {_MOST_STRIPPED} bytes", param=name
        )
    try:
        value = decode_json(text)
        if isinstance(value, dict | list):
            return encode_json(_stripped(value))
    except Undecodable as error:
        raise InvalidRequest(f"`{name}` is not valid JSON: {error}", param=name) from None
    except RecursionError:
        raise InvalidRequest(f"`{name}` is nested too deeply", param=name) from None
    return raw if isinstance(raw, msgspec.Raw) else text


def _stripped(value: Any) -> Any:
    """A decoded value without the forbidden names."""
    if isinstance(value, dict):
        return {
            key: _stripped(item) if isinstance(item, dict | list) else item
            for key, item in value.items()
            if key not in FORBIDDEN
        }
    return [_stripped(item) if isinstance(item, dict | list) else item for item in value]
