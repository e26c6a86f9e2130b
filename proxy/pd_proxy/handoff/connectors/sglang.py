"""SGLang: the legs meet in a room of prefill's bootstrap server, so both are sent at once.

Prefill holds a request back until decode has come to its room; then it computes the prompt, samples the first token and
pushes both. So the two legs are the client's body, whole: what shapes the first token must be on prefill's, and every
prompt of a list finds its own room, since both engines count up from the one they are told. From SGLang 0.5.23:

- An engine in one of the two roles answers 400 to a request without a room.
- Two live requests with one room take a scheduler down, hence a new room for each try, far from all others. With `n`
  above 1 the engines put the choices of a prompt into one room themselves, so that no such request may come to them.
- Prefill's and decode's rank must be of one mind: decode is told prefill's, and the room's number says it too, for
  engines that ask nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from pd_proxy.decoding import json_decoder
from pd_proxy.encoding import encode_json
from pd_proxy.handoff.connector import Connector, Handoff, Rendezvous, in_one_piece
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.traits import Order, Traits
from pd_proxy.requests.endpoints import Endpoint, Members

_FREE = 1 << 32
"""Rooms that are left free above the one that is told: more than the prompts that a body holds, times any number of
ranks."""


class _ServerInfo(msgspec.Struct):
    """What an engine says of itself."""

    disaggregation_mode: str
    disaggregation_bootstrap_port: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    dp_size: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 1


_read_info = json_decoder(_ServerInfo)


class SGLang(Connector):
    """SGLang's disaggregation, whatever its transfer backend."""

    traits = Traits(
        name="sglang",
        fingerprints=frozenset({"sglang"}),
        order=Order.CONCURRENT,
        negotiates=True,
        resumable=False,
        plain_decode=False,
        plain_prefill=False,
        endpoints=frozenset({"chat", "completions", "sglang_generate"}),
        splittable=frozenset({"prompt_list"}),
        info_pages=("/server_info", "/get_server_info"),  # the older name, which newer engines complain of
    )

    def prefill(self, members: Members, endpoint: Endpoint, *, token: bool = False) -> Members:
        return in_one_piece(members)

    def negotiate(self, prefill: Coordinates, decode: Coordinates, name: str, rank: int | None) -> Rendezvous:
        room = int(name[-16:], 16) % ((1 << 63) - _FREE)
        if rank is not None:
            room += rank - room % prefill.dp
        host = f"[{prefill.host}]" if ":" in prefill.host else prefill.host
        where = {
            "bootstrap_host": msgspec.Raw(encode_json(host)),
            "bootstrap_port": msgspec.Raw(b"%d" % prefill.port),
            "bootstrap_room": msgspec.Raw(b"%d" % room),
        }
        if rank is None:
            return Rendezvous(where, Handoff(where))
        said = msgspec.Raw(b"%d" % rank)
        # By a header the rank is not told on every endpoint.
        return Rendezvous({**where, "routed_dp_rank": said}, Handoff({**where, "disagg_prefill_dp_rank": said}))

    def per_prompt(self, rendezvous: Rendezvous, prompts: int, ranks: int) -> Rendezvous:
        assert rendezvous.handoff is not None  # both are sent at once
        room = int(bytes(rendezvous.prefill["bootstrap_room"]))
        each = {
            "bootstrap_host": _list([rendezvous.prefill["bootstrap_host"]] * prompts),
            "bootstrap_port": _list([rendezvous.prefill["bootstrap_port"]] * prompts),
            "bootstrap_room": _list([room + prompt * ranks for prompt in range(prompts)]),
        }
        return Rendezvous({**rendezvous.prefill, **each}, Handoff({**rendezvous.handoff.members, **each}))

    def learn(self, coordinates: Coordinates, answer: bytes) -> Coordinates:
        info = _read_info(answer)
        if info.disaggregation_mode != "prefill":
            raise ValueError(f"its disaggregation mode is {info.disaggregation_mode}")
        port = coordinates.port or info.disaggregation_bootstrap_port
        return msgspec.structs.replace(coordinates, port=port, dp=max(1, info.dp_size))


def _list(values: Sequence[object]) -> msgspec.Raw:
    return msgspec.Raw(encode_json(values))
