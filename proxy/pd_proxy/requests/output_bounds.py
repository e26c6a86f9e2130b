"""Applies the gateway's bounds of output tokens to a request, with the member names of each endpoint.

A request that asks for more than the bound is refused with an error that names the bound. If its bound were lowered
instead, a shortened answer would look like a complete one. A request that names no number gets the default, and the
`finish_reason` of its answer shows when that was reached.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from pd_proxy.decoding import Undecodable, decode_json, json_decoder
from pd_proxy.encoding import encode_json
from pd_proxy.errors import InvalidRequest
from pd_proxy.requests.endpoints import Endpoint, Members

_decode_object = json_decoder(dict[str, msgspec.Raw])
_decode_objects = json_decoder(list[msgspec.Raw])

_NAMES: Mapping[Endpoint, tuple[str, ...]] = {
    "chat": ("max_tokens", "max_completion_tokens"),
    "completions": ("max_tokens",),
    "messages": ("max_tokens",),
    "responses": ("max_output_tokens",),
    "generate": ("max_tokens",),
    "sglang_generate": ("max_new_tokens",),
}
"""The members that bound an answer, by endpoint. The first is set where a request has none."""

_NESTED = "sampling_params"
_IN_SAMPLING = frozenset({"generate", "sglang_generate"})


def bound_output(members: Members, endpoint: Endpoint, default: int | None, most: int | None) -> int | None:
    """Apply the bounds to a request. Sets the default in `members` where the request names no number.

    Arguments:
        default: the tokens for a request that names no number; None: `most`, or where that is None the engine's
            default.
        most: the most tokens that a request may ask for; None: any number.
    Returns:
        The default where it was applied, else None.
    Raises:
        InvalidRequest: the request asks for more than `most`.
    """
    if default is None:
        default = most
    names = _NAMES[endpoint]
    if endpoint not in _IN_SAMPLING:
        return _bound(members, names, default, most)
    raw = members.get(_NESTED)
    try:
        if raw is not None and bytes(memoryview(raw)[:1]) == b"[":
            each = [_decode_object(one) for one in _decode_objects(raw)]
            applied = [_bound(one, names, default, most) for one in each]
            members[_NESTED] = msgspec.Raw(encode_json(each))
            return next(filter(None, applied), None)
        sampling = {} if raw is None or bytes(raw) == b"null" else _decode_object(raw)
    except Undecodable:
        return None  # malformed, which the engine reports
    one = _bound(sampling, names, default, most)
    if one is not None:
        members[_NESTED] = msgspec.Raw(encode_json(sampling))
    return one


def _bound(members: Members, names: tuple[str, ...], default: int | None, most: int | None) -> int | None:
    named = False
    for name in names:
        value = decode_json(members[name]) if name in members else None
        if value is None:
            continue
        named = True
        if most is not None and isinstance(value, int | float) and value > most:
            raise InvalidRequest(f"`{name}` is above {most}, which is the most that this gateway allows", param=name)
    if named or default is None:
        return None
    members[names[0]] = msgspec.Raw(encode_json(default))
    return default
