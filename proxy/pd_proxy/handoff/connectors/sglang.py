"""SGLang: the legs are paired by a room of prefill's bootstrap server, so both are sent at once.

Prefill waits until decode has joined the room. Then it computes the prompt, samples the first token, and pushes the KV
cache and the token. So both legs have the client's whole body: all that shapes the first token must be in prefill's
leg. The prompts of a list have rooms of their own, since both engines count up from the room in their legs. From SGLang
0.5.23:

- An engine in one of the two roles answers 400 to a request without a room.
- Two live requests with one room crash a scheduler, so each try has a new room, far from all others. With `n` above 1
  the engines put all choices of a prompt into one room, so they must not get such requests.
- Both engines must agree on prefill's rank: the decode leg carries it, and the room's number contains it too, for
  engines that read only the room.
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
"""The number of rooms above the one in the legs that are left free. It is more than the prompts that a body can have,
times any number of ranks."""


class _ServerInfo(msgspec.Struct):
    """An engine's page with its settings, as far as it is read."""

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
        info_pages=("/server_info", "/get_server_info"),  # newer engines log a warning for the older name
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
        raw_rank = msgspec.Raw(b"%d" % rank)
        # Not every endpoint reads the rank from a header.
        return Rendezvous({**where, "routed_dp_rank": raw_rank}, Handoff({**where, "disagg_prefill_dp_rank": raw_rank}))

    def per_prompt(self, rendezvous: Rendezvous, prompts: int, ranks: int) -> Rendezvous:
        assert rendezvous.handoff is not None  # the order is concurrent, so the hand-off is known
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
