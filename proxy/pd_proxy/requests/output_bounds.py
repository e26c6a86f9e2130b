"""How many tokens an answer may have, by the settings of the gateway and in the words of each endpoint.

A request that asks for more than may be is refused, and the error says how many there are: an answer that was cut short
without a word would look like a whole one. One that names no number gets the default, which its `finish_reason` tells.
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
"""What each endpoint calls the bound; the first is the one that is set where there is none."""

_NESTED = "sampling_params"
_IN_SAMPLING = frozenset({"generate", "sglang_generate"})


def bound_output(members: Members, endpoint: Endpoint, default: int | None, most: int | None) -> int | None:
    """Hold a request to the bounds. Changes `members` where it names no number.

    Arguments:
        default: tokens of the answer to a request that names no number; None: `most`, or the engine's own.
        most: tokens that may be asked for; None: any number.
    Returns:
        The default, where it was applied.
    Raises:
        InvalidRequest: it asks for more.
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
        return None  # the engine says what is wrong with it
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
