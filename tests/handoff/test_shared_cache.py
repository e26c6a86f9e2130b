"""Shared caches: the legs have no parameters about each other."""

from __future__ import annotations

from math import inf

import pytest
from pd_proxy.handoff.answer import read_answer
from pd_proxy.handoff.connectors.shared_cache import SharedCache
from pd_proxy.handoff.plan import Plan
from pd_proxy.requests.body import read_body

from tests.handoff.helpers import PARAMS, answer, body_of

SHARED = SharedCache()
BODY = b'{"prompt":"a","max_tokens":9,"stream":true,"stream_options":{"include_usage":true}}'


@pytest.mark.parametrize("params", [None, {}, PARAMS, {"num_lmcache_cached_tokens": 3}])
def test_decode_has_the_clients_own_request_whatever_prefill_answers(params: object) -> None:
    made = Plan(read_body(BODY, "completions"), SHARED)
    prefill = body_of(made.prefill_leg())
    assert (prefill["max_tokens"], prefill["stream"]) == (1, False)
    assert "kv_transfer_params" not in prefill
    handoff, _ = made.take(answer(params))
    assert handoff is not None
    assert made.decode_leg(handoff).body == made.decode_leg(None).body


def test_nothing_is_held_so_nothing_is_freed() -> None:
    made = Plan(read_body(BODY, "completions"), SHARED)
    handoff = SHARED.take(read_answer(b'{"choices":[]}'))
    assert handoff is not None
    assert SHARED.traits.lease == inf
    assert made.release_leg(handoff, sent=False) is None
