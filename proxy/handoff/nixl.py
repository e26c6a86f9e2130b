"""vLLM's NixlConnector in pull mode: prefill answers with its blocks' address, decode reads them by RDMA.

Fields as in vLLM 0.32, `nixl/pull_scheduler.py`. Decode's scheduler trusts them: without block ids its engine dies
on an assertion, without one of the others the request waits for ever, so all are demanded here.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from proxy.handoff.body import Endpoint, Members
from proxy.handoff.connector import ASK, Handoff, Name, PullParams, one_token, pulled
from proxy.handoff.first_token import sampled_token


class NixlParams(PullParams):
    """What decode needs of prefill's parameters; they may hold more, which is passed on."""

    remote_request_id: Name
    tp_size: Annotated[int, msgspec.Meta(ge=1)]


_required = msgspec.json.Decoder(NixlParams)


class Nixl:
    """NixlConnector (pull)."""

    name = "nixl"
    lease = 30.0  # kv_lease_duration
    first_token = True  # it keeps the blocks however prefill's request ended, and reads them by position

    def prefill(self, members: Members, endpoint: Endpoint, *, token: bool = False) -> Members:
        return {**(sampled_token if token else one_token)(members), "kv_transfer_params": ASK}

    def handoff(self, params: msgspec.Raw) -> Handoff:
        return pulled(params, _required)

    def decode(self, members: Members, handoff: Handoff) -> Members:
        return {**members, "kv_transfer_params": handoff.params}

    def release(self, members: Members, handoff: Handoff, *, sent: bool) -> Members | None:
        # vLLM's handler refuses it (min_tokens above max_tokens), and by that alone tells prefill to free the blocks
        # (`_with_kv_transfer_rejection_cleanup` in 0.32): nothing is read, nothing computed.
        return {**one_token(members), "min_tokens": msgspec.Raw(b"2"), "kv_transfer_params": handoff.params}
