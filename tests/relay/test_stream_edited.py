"""Streams whose events are changed on the way, and what the transcript keeps of them for a resume."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.dialects.edit import Edit
from pd_proxy.relay.fast_path import FastPath
from pd_proxy.relay.transcript import Transcript

from tests.http.helpers import RecordingClient

from .streams import COUNTS, DONE, HIDE, PING, Stream, chunk, event, identity, members, opened, relayed

PROMPT = [101, 7, 102]
LOGPROBS = {"content": [{"token": "x", "logprob": -0.5, "bytes": [120], "top_logprobs": []}]}
CALL = [{"index": 0, "id": "call-1", "type": "function", "function": {"name": "f", "arguments": ""}}]
Value = dict[str, Any]


def chat(delta: Value, ids: list[int] | None, **more: Any) -> Value:
    """A chat event in vLLM's order. The prompt's ids stand behind the choices of the first."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **more, "token_ids": ids}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 9, "model": "m", "choices": [choice]}


def role(prompt: list[int] | None = PROMPT) -> Value:
    value = chat({"role": "assistant", "content": ""}, None)
    del value["choices"][0]["token_ids"]
    return value | {"prompt_token_ids": prompt}


def said(token: str, ids: list[int] | None, **more: Any) -> Value:
    return chat({"content": token}, ids, **more)


def text(token: str, ids: list[int] | None, prompt: list[int] | None = None, **more: Any) -> Value:
    """A completions event in vLLM's order. The prompt's ids are in the first one's choice."""
    choice = {"index": 0, "text": token, "logprobs": None, "finish_reason": None, "stop_reason": None, **more}
    choice |= {"prompt_token_ids": prompt, "token_ids": ids}
    return {"id": "cmpl-1", "object": "text_completion", "created": 9, "model": "m", "choices": [choice], "usage": None}


def hidden(value: Value) -> Value:
    """An event as it is for a client that asked for no ids."""
    kept = copy.deepcopy(value)
    for part in (kept, *kept["choices"]):
        part.pop("token_ids", None)
        part.pop("prompt_token_ids", None)
    return kept


def shown(values: list[Value]) -> bytes:
    return b"".join(event(hidden(value)) for value in values)


def as_is(values: list[Value]) -> bytes:
    return b"".join(map(event, values))


CHAT = [role(), said("Hel", [5]), said("lo", [6]), said(" you", [17])]
TEXT = [text("Hel", [5], PROMPT), text("lo", [6]), text(" you", [17])]
CHAT_END = chat({}, [2], finish_reason="stop", stop_reason=None)
TEXT_END = text("", [2], finish_reason="stop")
answers = pytest.mark.parametrize("values", [[*CHAT, CHAT_END], [*TEXT, TEXT_END]], ids=["chat", "completions"])


# Events without text


@pytest.mark.parametrize(
    ("choice", "beside"),
    [
        ({"logprobs": LOGPROBS}, {}),
        ({}, {"usage": COUNTS}),
        ({"matched_stop": 3}, {}),
        ({"hidden_states": [0.5]}, {}),
        ({}, {"metrics": {"queued": 0.5}}),
    ],
    ids=["logprobs", "usage", "stop", "states", "metrics"],
)
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("resumable", [False, True])
async def test_an_event_without_text_is_the_clients_where_anything_of_it_is(
    choice: Value, beside: Value, together: bool, resumable: bool
) -> None:
    empty = chat({}, [9], **choice) | beside
    values = [role(PROMPT if resumable else None), *CHAT[1:3], empty, empty, CHAT[3], empty, CHAT_END]
    reads = [as_is(values)] if together else [event(value) for value in values]
    stream = await relayed(*reads, DONE, edit=HIDE, finished=False)
    assert stream.client.body == shown(values) + DONE


@pytest.mark.parametrize("together", [False, True])
async def test_an_event_that_is_there_for_the_gateways_ids_alone_is_not_the_clients(together: bool) -> None:
    empty = chat({}, [9]) | {"system_fingerprint": "f", "usage": None}
    values = [*CHAT[:3], empty, CHAT[3], CHAT_END]
    reads = [as_is(values)] if together else [event(value) for value in values]
    stream = await relayed(*reads, DONE, edit=HIDE, finished=False)
    assert stream.client.body == shown([*CHAT, CHAT_END]) + DONE


# Ids


@answers
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("chunks", [False, True])
async def test_ids_are_hidden_from_a_client_that_did_not_ask(values: list[Value], together: bool, chunks: bool) -> None:
    reads = [as_is(values)] if together else [event(value) for value in values]
    stream = await relayed(*reads, DONE, edit=HIDE, chunks=chunks, finished=False)
    assert stream.client.body == shown(values) + DONE
    assert b"token_ids" not in stream.client.body
    assert stream.relay.given()[0] == 4
    assert stream.transcript.finished
    assert stream.transcript.inexact == ""
    assert stream.transcript.total == 4
    assert stream.transcript.truncate() == b"101,7,102,5,6,17"


@answers
@pytest.mark.parametrize("together", [False, True])
async def test_ids_are_kept_for_a_client_that_asked_and_written_down_all_the_same(
    values: list[Value], together: bool
) -> None:
    reads = [as_is(values)] if together else [event(value) for value in values]
    stream = await relayed(*reads, DONE, edit=Edit())
    assert stream.client.body == as_is(values) + DONE
    assert stream.transcript.total == 4
    assert stream.transcript.truncate() == b"101,7,102,5,6,17"
    assert b"".join(stream.connection.reads).count(b'"choices":[{') == len(values)  # none without being written down


@answers
async def test_hidden_ids_do_not_close_the_fast_path(values: list[Value]) -> None:
    stream = await opened(edit=HIDE)
    first, *rest = map(event, values[-4:-1])  # the first with ids, and what follows
    stream.read(*map(event, values[:-4]))
    assert stream.parsed(first) == [first]
    if values[0]["object"] == "text_completion":
        first, *rest = rest  # the first of all has the prompt's ids, and so is like no other
        assert stream.parsed(first) == [first]
    assert stream.parsed(*rest, *rest) == []
    assert stream.client.body == shown(values[:-1]) + shown(values[-1 - len(rest) : -1])
    stream.running.cancel()


@pytest.mark.parametrize(
    "odd",
    [
        chat({"content": "x", "reasoning_content": "y"}, [5]),
        chat({"role": "assistant", "content": "x"}, [5]),
        said("x", [5], logprobs=LOGPROBS),
        said("", [5]),
        said("x", None),
        chat({}, [5]),
        chat({"tool_calls": CALL}, [5]),
    ],
)
async def test_an_event_that_is_not_ordinary_is_parsed_each_time(odd: Value) -> None:
    stream = await opened(edit=HIDE)
    stream.read(*map(event, CHAT[:2]))
    assert stream.parsed(*[event(odd)] * 3) == [event(odd)] * 3
    assert stream.relay.given()[0] == 4
    stream.running.cancel()


@pytest.mark.parametrize("make", [said, text])
async def test_events_whose_ids_are_null_take_the_fast_path_where_none_are_hidden(
    make: Callable[[str, None], Value],
) -> None:
    stream = await opened()
    tokens = [event(make(token, None)) for token in ("a", "b", "c")]
    assert stream.parsed(*tokens) == tokens[:1]
    assert stream.client.body == b"".join(tokens)
    stream.running.cancel()


@pytest.mark.parametrize(
    "separators", [(", ", ": "), (",", ": "), (", ", ":"), (" ,\t", " : ")], ids=["usual", "colon", "comma", "odd"]
)
@answers
async def test_ids_are_hidden_whatever_the_spacing(values: list[Value], separators: tuple[str, str]) -> None:
    reads = [b"data: " + json.dumps(value, separators=separators).encode() + b"\n\n" for value in values]
    stream = await relayed(*reads, DONE, edit=HIDE)
    *found, done, _ = stream.client.body.split(b"\n\n")
    assert done == b"data: [DONE]"
    assert [members(one) for one in found] == [hidden(value) for value in values]
    assert stream.transcript.total == 4
    assert json.loads(b"[%b]" % stream.transcript.truncate()) == [*PROMPT, 5, 6, 17]


WORDS = [
    "token_ids",
    "prompt_token_ids",
    '"token_ids":[9]',
    '","token_ids":[9],"',
    '_transfer_params"',
    "kv_transfer_params",
    'say "hi"',
    "\\",
    '\\"',
    "]",
    "\n\n",
    "data: [DONE]\n\n",
    "é\U0001f600\u2028",
    '{"error":{"code":500}}',
    '"finish_reason":"stop"',
]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("make", [said, text])
@pytest.mark.parametrize("edit", [HIDE, Edit()])
async def test_a_text_is_only_text_whatever_its_content(word: str, make: Callable[..., Value], edit: Edit) -> None:
    opening = [role(), said("a", [5])] if make is said else [text("a", [5], PROMPT)]
    values = [*opening, make("b", [6]), make(word, [7]), make("c", [8]), make(word, [9]), make(word, [10])]
    for reads in ([event(value) for value in values], [as_is(values)]):
        stream = await relayed(*reads, DONE, edit=edit)
        assert stream.client.body == (shown(values) if edit.hide_ids else as_is(values)) + DONE
        assert stream.transcript.truncate() == b"101,7,102,5,6,7,8,9,10"
        assert stream.relay.given()[0] == 6


async def test_log_probabilities_reach_the_client_with_the_ids_hidden() -> None:
    values = [role(), *(said(token, [number], logprobs=LOGPROBS) for number, token in enumerate("abc", 5))]
    stream = await relayed(*map(event, values), DONE, edit=HIDE)
    assert stream.client.body == shown(values) + DONE
    assert stream.transcript.truncate() == b"101,7,102,5,6,7"


async def test_a_tool_call_reaches_the_client_and_makes_the_answer_inexact() -> None:
    values = [role(), said("a", [5]), said("b", [6]), chat({"tool_calls": CALL}, [7]), said("c", [8])]
    stream = await relayed(*map(event, values), DONE, edit=HIDE)
    assert stream.client.body == shown(values) + DONE
    assert stream.transcript.inexact == "tool_calls"
    assert stream.transcript.truncate() == b"101,7,102,5,6,7,8"


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
async def test_reasoning_makes_the_answer_inexact_and_text_after_it_takes_the_fast_path(field: str) -> None:
    values = [role(), chat({field: "hm"}, [5]), chat({field: "so"}, [6]), said("a", [7]), said("b", [8])]
    stream = await opened(edit=HIDE)
    stream.read(*map(event, values[:-1]))
    assert stream.parsed(event(values[-1])) == []
    stream.read(DONE)
    stream.end()
    assert await stream.outcome() is None
    assert stream.client.body == shown(values) + DONE
    assert stream.transcript.inexact == "reasoning"
    assert stream.transcript.truncate() == b"101,7,102,5,6,7,8"


# Tokens without text


@pytest.mark.parametrize("edit", [HIDE, Edit()])
@pytest.mark.parametrize("make", [said, text])
async def test_a_token_without_text_waits_for_the_next_with_text(make: Callable[..., Value], edit: Edit) -> None:
    """Until then it may have to be generated again, and would be given twice."""
    show = shown if edit.hide_ids else as_is
    opening = [role(), said("a", [5])] if make is said else [text("a", [5], PROMPT)]
    opening.append(make("b", [6]))
    empty = [make("", [7]), make("", [8])]
    more = [make("é", [9]), make("x", [10])]
    stream = await opened(edit=edit)
    stream.read(*map(event, opening + empty))
    assert stream.client.body == show(opening)
    assert (stream.transcript.said, stream.transcript.total) == (2, 4)
    stream.read(event(more[0]))
    assert stream.client.body == show(opening + empty + more[:1])
    stream.read(event(more[1]), *map(event, empty))
    assert stream.client.body == show(opening + empty + more)
    assert stream.transcript.said == 6
    assert stream.relay.given()[0] == 8
    assert stream.transcript.truncate() == b"101,7,102,5,6,7,8,9,10"
    stream.running.cancel()


@pytest.mark.parametrize("make", [said, text])
async def test_a_token_without_text_is_not_overtaken_on_the_fast_path(make: Callable[..., Value]) -> None:
    opening = [role(), said("a", [5])] if make is said else [text("a", [5], PROMPT)]
    values = [*opening, make("b", [6]), make("c", [7]), make("", [8]), make("d", [9]), make("e", [10])]
    stream = await opened(edit=HIDE)
    stream.read(*map(event, values[:-3]))
    assert stream.parsed(*map(event, values[-3:])) == [event(value) for value in values[-3:-1]]
    assert stream.client.body == shown(values)
    stream.running.cancel()


@answers
async def test_tokens_without_text_at_the_end_go_out_with_the_finish_reason(values: list[Value]) -> None:
    empty = said("", [8]) if "delta" in values[0]["choices"][0] else text("", [8])
    values = [*values[:-1], empty, empty, values[-1]]
    stream = await relayed(*map(event, values), DONE, edit=HIDE)
    assert stream.client.body == shown(values) + DONE
    assert stream.transcript.total == 6


async def test_a_token_without_text_goes_out_at_once_where_nothing_can_be_continued() -> None:
    values = [text("a", None), text("b", None), text("", None), text("", None)]
    stream = await opened()
    stream.read(*map(event, values))
    assert stream.client.body == as_is(values)
    stream.running.cancel()


@pytest.mark.parametrize("edit", [HIDE, Edit()])
async def test_an_empty_delta_that_exists_only_for_its_ids_is_dropped(edit: Edit) -> None:
    values = [role(), said("a", [5]), chat({}, [6]), said("b", [7]), chat({}, [8]), CHAT_END]
    stream = await relayed(*map(event, values), DONE, edit=edit)
    kept = [value for value in values if value["choices"][0]["delta"] != {} or value is CHAT_END]
    assert stream.client.body == (shown(kept) if edit.hide_ids else as_is(values)) + DONE
    assert stream.transcript.total == 5
    assert stream.transcript.truncate() == b"101,7,102,5,6,7"
    assert stream.relay.given()[0] == 5


@pytest.mark.parametrize("ids", [None, []])
@pytest.mark.parametrize("make", [said, text])
async def test_text_without_ids_leaves_nothing_to_go_on_from(make: Callable[..., Value], ids: list[int] | None) -> None:
    opening = [role(), said("a", [5])] if make is said else [text("a", [5], PROMPT)]
    values = [*opening, make("b", [6]), make("c", [7]), make("d", ids), make("e", [8])]
    stream = await relayed(*map(event, values), DONE, edit=HIDE)
    assert stream.client.body == shown(values) + DONE
    assert stream.transcript.inexact == "no_token_ids"
    assert not stream.transcript.continuable
    assert stream.transcript.truncate() == b""


@pytest.mark.parametrize("values", [[role(None), *CHAT[1:]], [text("a", [5]), *TEXT[1:]]], ids=["chat", "completions"])
async def test_an_answer_without_its_prompts_ids_leaves_nothing_to_go_on_from(values: list[Value]) -> None:
    stream = await relayed(*map(event, values), DONE, edit=HIDE)
    assert stream.client.body == shown(values) + DONE
    assert stream.transcript.inexact == "no_token_ids"
    assert not stream.transcript.continuable


async def test_an_answer_over_the_limit_goes_on_without_being_kept() -> None:
    transcript = Transcript(limit=50)
    stream = await relayed(*map(event, CHAT), *[event(CHAT[-1])] * 40, DONE, edit=HIDE, transcript=transcript)
    assert stream.client.body == shown(CHAT) + shown(CHAT[-1:]) * 40 + DONE
    assert transcript.inexact == "too_long"
    assert not transcript.continuable


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("edit", [HIDE, Edit()])
@answers
async def test_an_address_in_every_event_from_one_on_never_reaches_the_client(
    values: list[Value], edit: Edit, position: int
) -> None:
    leak = {"kv_transfer_params": {"remote_host": "10.0.0.1", "remote_port": 5600}}
    leaking = [value | leak if place >= position else value for place, value in enumerate(values)]
    stream = await relayed(*map(event, leaking), DONE, edit=edit)
    assert stream.client.body == (shown(values) if edit.hide_ids else as_is(values)) + DONE


# A leg that goes on with an answer


FIRST_LEG = identity(id="chatcmpl-0", created=1, model="m", object="chat.completion.chunk")
LATER = Edit(hide_ids=True, identity=FIRST_LEG, earlier_tokens=3)


def continued() -> Transcript:
    """Of an answer of which three tokens were sent."""
    transcript = Transcript()
    transcript.open(event({"id": "chatcmpl-0", "created": 1, "choices": []}), b"101,7,102")
    transcript.note(b"1,2,3", "abc")
    return transcript


async def test_a_later_leg_has_the_first_ones_identity_and_no_second_role() -> None:
    stream = await relayed(*map(event, [*CHAT, CHAT_END]), DONE, edit=LATER, transcript=continued(), finished=False)
    expected = [hidden(value) | {"id": "chatcmpl-0", "created": 1} for value in [*CHAT[1:], CHAT_END]]
    assert stream.client.body == as_is(expected) + DONE
    assert stream.transcript.truncate() == b"101,7,102,1,2,3,5,6,17"
    assert stream.transcript.finished


async def test_a_later_leg_shows_its_own_ids_but_not_its_prompts_to_a_client_that_asked() -> None:
    same = identity(id="cmpl-0", created=1)
    values = [text("a", [5], [*PROMPT, 1, 2, 3]), text("b", [6])]
    stream = await relayed(
        *map(event, values), DONE, edit=Edit(identity=same, earlier_tokens=3), transcript=continued()
    )
    expected = [text("a", [5]), text("b", [6])]
    assert stream.client.body == as_is([value | {"id": "cmpl-0", "created": 1} for value in expected]) + DONE
    chats = await relayed(
        *map(event, CHAT), DONE, edit=Edit(identity=FIRST_LEG, earlier_tokens=3), transcript=continued()
    )
    assert chats.client.body == as_is([value | {"id": "chatcmpl-0", "created": 1} for value in CHAT[1:]]) + DONE


async def test_a_role_that_comes_with_text_is_not_dropped() -> None:
    value = chat({"role": "assistant", "content": "x"}, [5])
    stream = await relayed(event(value), DONE, edit=LATER, transcript=continued())
    assert stream.client.body == as_is([hidden(value) | {"id": "chatcmpl-0", "created": 1}]) + DONE


@pytest.mark.parametrize("drop", [True, False])
async def test_the_usage_of_a_later_leg_is_shown_as_the_answers_and_kept_as_the_legs(drop: bool) -> None:
    usage = event({"id": "chatcmpl-1", "choices": [], "usage": COUNTS})
    stream = await relayed(*map(event, CHAT), usage, DONE, edit=LATER, transcript=continued(), drop_usage=drop)
    *_, last = stream.client.body.removesuffix(b"\n\n" + DONE).split(b"\n\n")
    if drop:
        assert b"usage" not in stream.client.body
    else:
        assert members(last) == {
            "id": "chatcmpl-0",
            "choices": [],
            "usage": {
                "prompt_tokens": 4,
                "completion_tokens": 6,
                "total_tokens": 10,
                "prompt_tokens_details": {"cached_tokens": 4},
            },
        }
    assert stream.relay.usage is not None
    assert (stream.relay.usage.prompt_tokens, stream.relay.usage.completion_tokens) == (7, 3)


async def test_the_first_event_of_an_answer_stays_the_first_legs() -> None:
    transcript = continued()
    first = transcript.first
    await relayed(*map(event, CHAT), DONE, edit=LATER, transcript=transcript)
    assert transcript.first == first
    assert transcript.prompt_tokens == 3


# Whatever comes, however it is split


TOKENS = st.text(min_size=1, max_size=8) | st.sampled_from(WORDS)
IDS = st.integers(0, 200_000)


@st.composite
def streams(draw: st.DrawFn, min_size: int = 0, empty_first: bool = True) -> list[Value]:
    """Events of one answer: mostly plain ones of a token each."""
    completions = draw(st.booleans())
    make = text if completions else said
    kinds = ["plain"] * 6 + ["empty", "several", "logprobs"]
    kinds += [] if completions else ["silent", "silent with logprobs", "silent with usage", "reasoning", "call"]
    values = [] if completions else [role()]
    for number, kind in enumerate(draw(st.lists(st.sampled_from(kinds), min_size=min_size, max_size=25))):
        if completions and not number and not empty_first:
            kind = "plain"
        ids = [draw(IDS)]
        if kind == "several":
            ids += draw(st.lists(IDS, min_size=1, max_size=3))
        more: Value = {"logprobs": LOGPROBS} if kind == "logprobs" else {}
        if completions and not number:
            more["prompt"] = PROMPT
        if kind in ("reasoning", "call"):
            values.append(chat({"reasoning": draw(TOKENS)} if kind == "reasoning" else {"tool_calls": CALL}, ids))
        elif kind.startswith("silent"):
            beside = {"usage": COUNTS} if kind.endswith("usage") else {}
            values.append(chat({}, ids, **({"logprobs": LOGPROBS} if kind.endswith("logprobs") else {})) | beside)
        else:
            values.append(make("" if kind == "empty" else draw(TOKENS), ids, **more))
    finish = draw(st.sampled_from([("", "length"), ("", "stop"), ("x", "length")]))
    if completions:
        values.append(text(finish[0], [draw(IDS)], None if len(values) else PROMPT, finish_reason=finish[1]))
    else:
        values.append(chat({"content": finish[0]} if finish[0] else {}, [draw(IDS)], finish_reason=finish[1]))
    return values


def has_text(value: Value) -> bool:
    choice = value["choices"][0]
    if "text" in choice:
        return bool(choice["text"])
    return any(carried for name, carried in choice["delta"].items() if name != "role")


def ids_up_to_the_last_text(values: list[Value]) -> list[int]:
    ids: list[int] = []
    sent = 0
    for value in values:
        ids += value["choices"][0].get("token_ids") or []
        if has_text(value):
            sent = len(ids)
    return ids[:sent]


def start_of(values: list[Value]) -> int:
    """Where the first token is."""
    return int("role" in values[0]["choices"][0].get("delta", {}))


def is_silent(value: Value) -> bool:
    """Whether an event is only there for the ids that the gateway asked for."""
    choice = value["choices"][0]
    asked_for = choice["logprobs"] or value.get("usage")
    return choice.get("delta") == {} and choice["finish_reason"] is None and not asked_for


def waits(value: Value) -> bool:
    """Whether an event goes out with the next one only."""
    choice = value["choices"][0]
    return not has_text(value) and choice["finish_reason"] is None and "role" not in choice.get("delta", {})


def slowly(values: list[Value], hide: bool) -> bytes:
    """The client's bytes, event by event."""
    if not hide:
        return as_is(values)
    return shown([value for value in values if not is_silent(value)])


def written(value: Value, ascii_only: bool) -> bytes:
    said = json.dumps(value, separators=(",", ":"), ensure_ascii=ascii_only)
    return b"data: " + said.encode() + b"\n\n"


@pytest.mark.parametrize("hide", [True, False])
@given(
    values=streams(min_size=1),
    together=st.lists(st.integers(0, 60), max_size=6),
    merged=st.lists(st.integers(0, 60), max_size=6),
    cuts=st.lists(st.integers(0, 20_000), max_size=8),
    pings=st.lists(st.integers(1, 60), max_size=2),
    chunks=st.sampled_from([True, True, True, False]),
    ascii_only=st.booleans(),
    with_text=st.booleans(),
)
def test_any_stream_in_any_split_is_as_if_each_event_were_read_alone(
    hide: bool,
    values: list[Value],
    together: list[int],
    merged: list[int],
    cuts: list[int],
    pings: list[int],
    chunks: bool,
    ascii_only: bool,
    with_text: bool,
) -> None:
    events: list[bytes] = []
    expected = held = b""
    for place, value in enumerate(values):
        events.append(written(value, ascii_only))
        held += b"" if hide and is_silent(value) else written(hidden(value) if hide else value, ascii_only)
        if not waits(value):
            expected += held
            held = b""
        if place in pings and place > start_of(values):
            events.append(PING)
            expected += PING
    events.append(DONE)
    expected += DONE
    # Some events share a chunk, some chunks share a read, and some reads end anywhere.
    coded = b""
    ends = {0}
    for place, one in enumerate(events):
        held += one
        if place not in together or one is DONE:
            coded += chunk(held)
            held = b""
            ends.add(len(coded))
    coded += b"0\r\n\r\n"
    places = (ends - {sorted(ends)[number % len(ends)] for number in merged}) | {cut % len(coded) for cut in cuts}
    places |= {0, len(coded)}

    async def relay() -> Stream:
        transcript = Transcript(with_text=with_text)
        stream = await opened(edit=Edit(hide_ids=hide), chunks=chunks, transcript=transcript, finished=False)
        stream.feed(*(coded[start:stop] for start, stop in pairwise(sorted(places))))
        assert await stream.outcome() is None
        return stream

    stream = asyncio.run(relay())
    assert stream.client.body == expected
    assert stream.client.ended
    assert all(write.endswith(b"\n\n") for write in stream.client.writes)
    assert stream.protocol is stream.connection
    tokens = len(values) - start_of(values)
    assert stream.relay.given()[0] == tokens
    assert sum(stream.gaps.counts) == tokens - 1
    assert stream.transcript.truncate() == ",".join(map(str, PROMPT + ids_up_to_the_last_text(values))).encode()
    assert stream.transcript.fresh == []
    if not stream.transcript.inexact:
        said = [value["choices"][0] for value in values]
        whole = "".join(choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in said)
        assert stream.transcript.text == (whole if with_text else None)


def tokens_shown(body: bytes) -> list[tuple[str, str]]:
    """What of an answer has text: the kind of text, and the text."""
    found: list[tuple[str, str]] = []
    for one in body.removesuffix(DONE).split(b"\n\n")[:-1]:
        choice = members(one)["choices"][0]
        for kind, said in {"text": choice.get("text"), **choice.get("delta", {})}.items():
            if said and kind != "role":
                found.append((kind, json.dumps(said)))
    return found


@pytest.mark.parametrize("hide", [True, False])
@given(values=streams(min_size=1, empty_first=False), data=st.data())
def test_an_answer_cut_anywhere_and_continued_from_its_cut_is_the_answer(
    hide: bool, values: list[Value], data: st.DataObject
) -> None:
    prompt = ",".join(map(str, PROMPT)).encode()

    async def relay() -> tuple[RecordingClient, Transcript]:
        client, transcript = RecordingClient(), Transcript()
        rest, edit = values, Edit(hide_ids=hide)
        for leg in range(3):
            stream = await opened(edit=edit, client=client, transcript=transcript, finished=False)
            whole = leg == 2
            stop = len(rest) if whole else data.draw(st.integers(0, len(rest)))
            stream.read(*map(event, rest[:stop]))
            if whole:
                stream.read(DONE)
                stream.end()
                assert await stream.outcome() is None
                break
            stream.lose(None)
            assert await stream.outcome() is not None
            if transcript.finished:
                break
            if not stream.relay.live:
                assert leg or not client.started
                continue
            cut = transcript.truncate()
            assert cut.startswith(prompt)
            kept = cut[len(prompt) :].split(b",")[1:]
            assert transcript.said == len(kept)
            # Another engine: its own id, its own role, the answer so far for a part of its prompt.
            rest, passed = [], 0
            for value in values:
                ids = value["choices"][0].get("token_ids") or []
                passed += len(ids)
                if passed > len(kept):
                    rest.append(copy.deepcopy(value) | {"id": f"leg-{leg}"})
            longer = [*PROMPT, *map(int, kept)]
            if "text" in values[0]["choices"][0]:
                rest[0]["choices"][0]["prompt_token_ids"] = longer
            else:
                rest.insert(0, role(longer) | {"id": f"leg-{leg}", "created": 10})
            edit = Edit(hide_ids=hide, identity=transcript.identity, earlier_tokens=transcript.said)
        return client, transcript

    client, transcript = asyncio.run(relay())
    if not client.started:
        return
    assert tokens_shown(client.body) == tokens_shown(slowly(values, hide))
    found = [members(one) for one in client.body.removesuffix(DONE).split(b"\n\n")[:-1]]
    assert {(value["id"], value["created"]) for value in found} == {(values[0]["id"], values[0]["created"])}
    assert sum("role" in value["choices"][0].get("delta", {}) for value in found) == (
        "delta" in values[0]["choices"][0]
    )
    prompts = [
        ids
        for value in found
        for ids in (value.get("prompt_token_ids"), value["choices"][0].get("prompt_token_ids"))
        if ids
    ]
    assert prompts == ([] if hide else [PROMPT])
    assert transcript.truncate() == b",".join([prompt, *(b"%d" % number for number in ids_up_to_the_last_text(values))])


async def test_patterns_are_learnt_from_the_engines_own_events() -> None:
    """An edited one would let none of the engine's pass."""
    stream = await opened(edit=HIDE)
    stream.read(*map(event, CHAT))
    assert isinstance(stream.protocol, FastPath)
    assert stream.transcript.fresh == [b"5", b"6", b"17"]
    assert msgspec.json.decode(stream.client.writes[-1].removeprefix(b"data: ")) == hidden(CHAT[-1])
    stream.running.cancel()
