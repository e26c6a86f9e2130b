"""The phases of a stream: the table, and that whatever happens to a stream moves it along the table."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.dialects.edit import Edit
from pd_proxy.errors import BackendError, BackendLost
from pd_proxy.relay.phase import TRANSITIONS, Phase
from pd_proxy.transitions import ImpossibleTransition

from tests.http.helpers import faults

from .streams import DONE, HIDE, PING, Stream, chat, event, opened

POSSIBLE = {
    (Phase.HOLDING, Phase.LIVE),
    (Phase.HOLDING, Phase.OVER),
    (Phase.LIVE, Phase.CLOSING),
    (Phase.LIVE, Phase.OVER),
    (Phase.CLOSING, Phase.OVER),
}


@pytest.mark.parametrize("then", Phase)
@pytest.mark.parametrize("now", Phase)
def test_the_table_has_these_transitions_and_no_other(now: Phase, then: Phase) -> None:
    if (now, then) in POSSIBLE:
        assert TRANSITIONS[now][then] is then
    else:
        with pytest.raises(ImpossibleTransition, match=rf"{now.value} cannot become {then.value}"):
            TRANSITIONS[now][then]


def reachable(now: Phase) -> set[Phase]:
    """The phases that one leads to in any number of steps, itself among them."""
    found, ahead = {now}, [now]
    while ahead:
        for then in TRANSITIONS[ahead.pop()]:
            if then not in found:
                found.add(then)
                ahead.append(then)
    return found


ROLE, TEXT, EMPTY = chat({"role": "assistant", "content": ""}), chat({"content": "a"}), chat({"content": ""})
ERROR = event({"error": {"message": "no luck", "type": "InternalServerError", "code": 500}})
FINISH = chat({"content": "b"}, finish_reason="stop")
LOST = BackendLost("failed its checks")


def broken(stream: Stream) -> None:
    stream.lose(ConnectionResetError())


READS = {
    "a role": ROLE,
    "a text": TEXT,
    "a text with ids": chat({"content": "a"}, token_ids=[5]),
    "no text": EMPTY,
    "two texts": TEXT + TEXT,
    "an end": FINISH,
    "an abort": chat({"content": ""}, finish_reason="abort"),
    "a ping": PING,
    "an error": ERROR,
    "done": DONE,
    "all at once": ROLE + TEXT + FINISH + DONE,
    "done and more": FINISH + DONE + TEXT,
    "an error behind done": TEXT + DONE + ERROR,
    "half an event": TEXT[:20],
    "the other half": TEXT[20:],
    "no event": b"data: {\n\n",
}
ACTIONS: dict[str, Callable[[Stream], object]] = {
    "the engine ends": Stream.end,
    "the engine is gone": broken,
    "the engine is silent": lambda stream: stream.relay.engine_is_silent(1.0),
    "the engine is suspected": lambda stream: stream.relay.suspect(LOST),
    "no token came in time": lambda stream: stream.relay.overdue(1.0),
    "the client is slow": lambda stream: stream.relay.pause(),
    "the client reads again": lambda stream: stream.relay.resume(),
    "the client is silent": lambda stream: stream.relay.client_is_silent(),
    "the client leaves": lambda stream: stream.relay.stop(),
    "the flow fails it": lambda stream: stream.relay.fail(LOST),
    "the flow gives it up": lambda stream: stream.running.cancel(),
}


@given(
    steps=st.lists(st.sampled_from([*READS, *READS, *ACTIONS]), max_size=12),
    edit=st.sampled_from([Edit(), HIDE]),
    turns=st.booleans(),
)
async def test_whatever_happens_moves_a_stream_along_the_table(steps: list[str], edit: Edit, turns: bool) -> None:
    stream = await opened(edit=edit, finished=False, idle=60.0)
    relay, client = stream.relay, stream.client
    with faults() as found:
        for step in steps:
            before, written = relay.phase, client.body
            if step in READS:
                stream.read(READS[step])
            elif stream.connection._receiver is not None or not step.startswith("the engine"):
                ACTIONS[step](stream)
            assert relay.phase in reachable(before)
            if relay.phase is Phase.HOLDING:
                assert not client.body and not client.started and not relay.live
            if relay.phase in (Phase.LIVE, Phase.CLOSING):
                assert relay.live and client.started
            if before is Phase.OVER:
                assert client.body == written
            if turns:
                await asyncio.sleep(0)
        stream.running.cancel()
        with suppress(BackendError, asyncio.CancelledError):
            await stream.running
    assert relay.phase is Phase.OVER
    assert client.flow is None
    assert found == []
