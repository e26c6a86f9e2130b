"""The log probabilities of prompts: prefill's are put before decode's, whatever they contain."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.dialects.prompt_logprobs import NAMES, PromptLogprobs
from pd_proxy.errors import BackendGarbled, InvalidRequest

ENTRY = st.tuples(
    st.none() | st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 10**6), st.none() | st.text()
)
LIST = st.lists(ENTRY | st.none() | st.lists(ENTRY))
META = st.dictionaries(st.sampled_from([*NAMES, "id", "output_token_logprobs"]), LIST | st.none())
LAYOUT = st.sampled_from([{}, {"separators": (",", ":")}, {"indent": 1}])


def encoded(value: Any, **layout: Any) -> bytes:
    return json.dumps(value, **layout).encode()


@pytest.fixture
async def loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def merged(prefill: dict[str, Any], decode: dict[str, Any]) -> dict[str, Any]:
    meta = dict(decode)
    for name in NAMES:
        if prefill.get(name):
            meta[name] = prefill[name] + (decode.get(name) or [])
    return meta


@given(metas=st.lists(st.tuples(META, META), min_size=1), several=st.booleans(), layout=LAYOUT)
@pytest.mark.slow
def test_each_answer_has_prefills_before_its_own(metas: list[Any], several: bool, layout: dict[str, Any]) -> None:
    loop = asyncio.new_event_loop()
    try:
        prefill = [{"text": "p", "meta_info": meta} for meta, _ in metas]
        decode = [{"text": "d", "meta_info": meta} for _, meta in metas]
        expected = [{"text": "d", "meta_info": json.loads(json.dumps(merged(p, d)))} for p, d in metas]
        logprobs = PromptLogprobs(loop)
        logprobs.take(encoded(prefill if several else prefill[0], **layout))
        assert logprobs.here.done()
        shown = json.loads(logprobs.whole(encoded(decode if several else decode[0], **layout)))
        assert shown == (expected if several else expected[0])
    finally:
        loop.close()


@pytest.mark.parametrize("decode", [[], [{"meta_info": {}}], [{"meta_info": {}}] * 3, "text", {"meta_info": 5}])
async def test_an_answer_for_other_prompts_is_none(decode: Any, loop: asyncio.AbstractEventLoop) -> None:
    logprobs = PromptLogprobs(loop)
    logprobs.take(encoded([{"meta_info": {NAMES[0]: [[None, 1, None]]}}] * 2))
    with pytest.raises(BackendGarbled):
        logprobs.whole(encoded(decode))
    with pytest.raises(BackendGarbled):
        logprobs.into({"meta_info": msgspec.Raw(b"{}")}, 2)


async def test_the_kept_lists_are_bounded(loop: asyncio.AbstractEventLoop) -> None:
    answer = encoded({"meta_info": {NAMES[0]: [[-0.5, 1, None]] * 10, "hidden_states": [0] * 1000}})
    PromptLogprobs(loop, 200).take(answer)
    logprobs = PromptLogprobs(loop, 100)
    with pytest.raises(InvalidRequest) as refused:
        logprobs.take(answer)
    assert refused.value.param == "stream" and not logprobs.here.done()
