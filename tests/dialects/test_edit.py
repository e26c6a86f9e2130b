"""How one event becomes the client's."""

from __future__ import annotations

import copy
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.decoding import Undecodable
from pd_proxy.dialects.edit import Edit
from pd_proxy.dialects.sse import payload

from tests.relay.streams import HIDE, chat, event, identity, members, text

ADDRESS = {"remote_host": "10.0.0.1", "remote_port": 5600, "remote_block_ids": [[1, 2]]}
SAME = identity(id="chatcmpl-0", created=1, model="m", object="chat.completion.chunk")
NASTY = [
    "token_ids",
    '"token_ids":[1,2]',
    ',"token_ids":[',
    ',"token_ids":null',
    'x","token_ids":[5',
    "\\",
    '\\"',
    '\\","prompt_token_ids":[7],"',
    "kv_transfer_params",
    'kv_transfer_params"',
    "]",
    "}]}",
    "\n\ndata: [DONE]\n\n",
    "é\u2028\U0001f600\x00\x7f",
    '"usage":{"prompt_tokens":1}',
]


def shown(said: bytes, edit: Edit) -> bytes:
    return edit.event(said, payload(said))


def without(value: dict[str, Any], *names: str) -> dict[str, Any]:
    """An event less these members, of itself and of its choices."""
    kept = copy.deepcopy(value)
    for part in (kept, *kept["choices"]):
        for name in names:
            part.pop(name, None)
    return kept


def compact(value: dict[str, Any]) -> bytes:
    return event(value)


def spaced(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def loose(value: dict[str, Any]) -> bytes:
    return b"data:" + json.dumps(value, separators=(" ,  ", " :\t")).encode() + b"\r\n\r\n"


def unescaped(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


WRITERS = [compact, spaced, loose, unescaped]


def chat_event(token: str, ids: Any, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": token}, "logprobs": None, "finish_reason": None, "token_ids": ids}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 9,
        "model": "m",
        "choices": [choice],
    } | more


def text_event(token: str, ids: Any, prompt: Any = None) -> dict[str, Any]:
    choice = {"index": 0, "text": token, "logprobs": None, "finish_reason": None, "stop_reason": None}
    return {"id": "cmpl-1", "created": 9, "choices": [{**choice, "prompt_token_ids": prompt, "token_ids": ids}]}


# Idle


@pytest.mark.parametrize(
    "said", [chat({"content": "x"}, token_ids=[5]), text("token_ids"), b"data: {nope\n\n", b": x\n\n"]
)
def test_nothing_to_change_changes_nothing(said: bytes) -> None:
    edit = Edit()
    assert edit.idle
    assert shown(said, edit) is said


@pytest.mark.parametrize("edit", [HIDE, Edit(identity=SAME), Edit(identity=SAME, earlier_tokens=3)])
def test_anything_to_change_is_not_idle(edit: Edit) -> None:
    assert not edit.idle


# The hand-off


@pytest.mark.parametrize(
    "edit", [Edit(), HIDE, Edit(identity=SAME, earlier_tokens=3), Edit(hide_ids=True, identity=SAME)]
)
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("field", ["kv_transfer_params", "ec_transfer_params"])
def test_the_hand_off_is_taken_out(edit: Edit, write: Any, field: str) -> None:
    result = members(shown(write(chat_event("x", [5], **{field: ADDRESS})), edit))
    assert field not in result
    assert "10.0.0.1" not in json.dumps(result)
    assert result["choices"][0]["delta"] == {"content": "x"}


# Token ids


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("ids", [[5], [5, 6], [], None, [151_643] * 50])
@pytest.mark.parametrize("token", ["x", "", *NASTY])
def test_ids_are_hidden_and_all_else_is_as_it_was(write: Any, ids: Any, token: str) -> None:
    for value in (
        chat_event(token, ids),
        chat_event(token, ids, prompt_token_ids=[1, 2, 3]),
        chat_event(token, ids, prompt_token_ids=None),
        text_event(token, ids),
        text_event(token, ids, [1, 2, 3]),
    ):
        result = members(shown(write(value), HIDE))
        assert result == without(value, "token_ids", "prompt_token_ids")
        assert list(result) == [name for name in value if name != "prompt_token_ids"]


@pytest.mark.parametrize("token", ["x", "", "é", "token_ids", "kv_transfer_params"])
def test_compact_json_stays_the_same_to_the_byte(token: str) -> None:
    for value in (chat_event(token, [5]), text_event(token, [5, 6]), text_event(token, [5], [1, 2])):
        assert shown(compact(value), HIDE) == compact(without(value, "token_ids", "prompt_token_ids"))


@pytest.mark.parametrize("write", WRITERS)
def test_the_ids_of_every_choice_are_hidden(write: Any) -> None:
    value = text_event("a", [5], [1])
    value["choices"].append({**value["choices"][0], "index": 1, "token_ids": [6, 7]})
    assert members(shown(write(value), HIDE)) == without(value, "token_ids", "prompt_token_ids")


@pytest.mark.parametrize("write", WRITERS)
def test_ids_that_stand_first_in_their_choice_are_hidden(write: Any) -> None:
    value = {"id": "x", "choices": [{"token_ids": [5], "index": 0, "text": "a"}]}
    assert members(shown(write(value), HIDE)) == without(value, "token_ids")


def test_log_probabilities_stay_when_ids_are_hidden() -> None:
    logprobs = {"content": [{"token": "x", "logprob": -0.5, "bytes": [120], "top_logprobs": []}]}
    value = chat_event("x", [5])
    value["choices"][0]["logprobs"] = logprobs
    assert members(shown(compact(value), HIDE))["choices"][0]["logprobs"] == logprobs


@pytest.mark.parametrize("choices", [[], None])
def test_an_event_without_choices_is_edited_too(choices: Any) -> None:
    value = {"id": "x", "choices": choices, "prompt_token_ids": [1, 2], "kv_transfer_params": ADDRESS}
    assert members(shown(compact(value), HIDE)) == {"id": "x", "choices": choices}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8) | st.sampled_from(NASTY),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["token", "text", "bytes", "ids"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(token=st.text(max_size=12) | st.sampled_from(NASTY), extra=JSON, data=st.data())
def test_hiding_takes_out_the_ids_and_nothing_else(token: str, extra: Any, data: st.DataObject) -> None:
    value: dict[str, Any] = data.draw(st.sampled_from([chat_event, text_event]))(
        token, data.draw(st.none() | st.lists(st.integers(0, 200_000), max_size=4))
    )
    value["choices"][0]["logprobs"] = extra
    choice = value["choices"][0]
    value["choices"] = [dict(data.draw(st.permutations(list(choice.items()))))]
    if data.draw(st.booleans()):
        value["prompt_token_ids"] = data.draw(st.none() | st.lists(st.integers(0, 200_000), max_size=4))
    write = data.draw(st.sampled_from(WRITERS))
    assert members(shown(write(value), HIDE)) == without(value, "token_ids", "prompt_token_ids")


# A continued leg


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("token", ["x", "", *NASTY])
def test_a_later_leg_takes_on_the_first_ones_identity(write: Any, token: str) -> None:
    value = chat_event(token, [5])
    result = members(shown(write(value), Edit(identity=SAME)))
    assert result == {**value, "id": "chatcmpl-0", "created": 1}
    assert list(result) == list(value)


def test_a_member_that_the_engine_does_not_give_is_not_added() -> None:
    said = event({"id": "x", "choices": []})
    assert members(shown(said, Edit(identity=SAME))) == {"id": "chatcmpl-0", "choices": []}


def test_a_client_that_asked_gets_the_ids_of_a_later_leg_but_not_its_prompts() -> None:
    result = members(shown(compact(text_event("x", [5], [1, 2, 3, 4])), Edit(identity=SAME, earlier_tokens=2)))
    assert result["choices"][0]["token_ids"] == [5]
    assert result["choices"][0]["prompt_token_ids"] is None


def test_a_client_that_did_not_ask_gets_no_ids_of_a_later_leg() -> None:
    value = text_event("x", [5], [1, 2, 3, 4])
    result = members(shown(compact(value), Edit(hide_ids=True, identity=SAME, earlier_tokens=2)))
    assert result == {**without(value, "token_ids", "prompt_token_ids"), "id": "chatcmpl-0", "created": 1}


def test_the_usage_of_a_later_leg_is_that_of_the_whole_answer() -> None:
    usage = {
        "prompt_tokens": 13,
        "completion_tokens": 5,
        "total_tokens": 18,
        "prompt_tokens_details": {"cached_tokens": 12, "other": 1},
        "more": None,
    }
    result = members(shown(event({"id": "x", "choices": [], "usage": usage}), Edit(identity=SAME, earlier_tokens=3)))
    assert result["usage"] == {
        **usage,
        "prompt_tokens": 10,
        "completion_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 10, "other": 1},
    }


@pytest.mark.parametrize(
    "usage",
    [
        {},
        {"prompt_tokens": 13},
        {"completion_tokens": 4},
        {"prompt_tokens": None, "completion_tokens": 4},
        {"prompt_tokens": "13", "completion_tokens": 4},
    ],
)
def test_usage_without_counts_stays(usage: dict[str, Any]) -> None:
    assert Edit(identity=SAME, earlier_tokens=3).merge(usage) == usage


@pytest.mark.parametrize("details", [None, {}, {"cached_tokens": None}, {"cached_tokens": 2}, 5])
def test_details_without_more_cached_tokens_than_prompt_stay(details: Any) -> None:
    usage = {"prompt_tokens": 13, "completion_tokens": 5, "prompt_tokens_details": details}
    merged = Edit(identity=SAME, earlier_tokens=3).merge(usage)
    assert merged == {"prompt_tokens": 10, "completion_tokens": 8, "prompt_tokens_details": details}


def test_merging_does_not_change_its_argument() -> None:
    usage = {"prompt_tokens": 13, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 12}}
    before = copy.deepcopy(usage)
    Edit(identity=SAME, earlier_tokens=3).merge(usage)
    assert usage == before


@pytest.mark.parametrize("said", [b"data: {nope\n\n", b"data: [1]\n\n", b'data: {"choices":5}\n\n'])
def test_an_event_that_cannot_be_edited_is_an_error(said: bytes) -> None:
    assert shown(said, HIDE) == said
    with pytest.raises(Undecodable):
        shown(said, Edit(identity=SAME, earlier_tokens=3))
    with pytest.raises(Undecodable):
        shown(said.replace(b"\n", b'"kv_transfer_params":1\n', 1), HIDE)


@pytest.mark.parametrize(
    "name", [rb"kv\u005ftransfer_params", rb"ec_transfer_param\u0073", rb"disaggregated_params", rb"kv_transfer_params"]
)
@pytest.mark.parametrize("edit", [Edit(), HIDE, Edit(identity=SAME, earlier_tokens=3)])
def test_a_hand_off_is_taken_out_of_an_event_however_it_is_spelled(name: bytes, edit: Edit) -> None:
    said = b'data: {"%b":{"a":"10.0.0.1"},"choices":[{"delta":{"content":"x"},"%b":{"a":"10.0.0.1"}}]}\n\n' % (
        name,
        name,
    )
    assert shown(said, edit) == b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'


# What stands before a text


def test_the_head_of_an_ordinary_event_takes_on_the_answers_identity() -> None:
    event = b'data: {"id":"b","created":22,"model":"m","choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
    length = event.index(b'x"}')
    identity = {"id": msgspec.Raw(b'"first"'), "created": msgspec.Raw(b"1")}
    shown = Edit(identity=identity, earlier_tokens=1).head(event, length)
    assert shown == b'data: {"id":"first","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"'
    assert Edit().head(event, length) == event[:length]


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"id":"b","choices":[{"text":"x"}],"usage":{"prompt_tokens":3}}\n\n',  # its counts are to be changed
        b'data: {"id": "b","choices":[{"text":"x"}]}\n\n',  # not written as it would be written again
        b'data: {"choices":[{"text":"x"}],"id":"b"}\n\n',  # something behind the text is to be changed
        b'data: {"id":"b",\n\n',
    ],
)
def test_an_event_of_which_more_is_changed_has_no_head(event: bytes) -> None:
    assert Edit(identity={"id": msgspec.Raw(b'"first"')}, earlier_tokens=1).head(event, event.find(b"x")) == b""


def test_the_prompts_ids_are_given_with_a_leg_that_begins_anew_and_not_with_one_that_goes_on() -> None:
    """A first token without text is held back, and with it the ids; the next leg is the first to give them."""
    payload = b'{"id":"b","choices":[{"index":0,"text":"x","prompt_token_ids":[1,2]}]}'
    identity = {"id": msgspec.Raw(b'"a"')}
    anew, on = (
        Edit(identity=identity, earlier_tokens=said).event(b"data: %b\n\n" % payload, payload) for said in (0, 1)
    )
    assert b'"prompt_token_ids":[1,2]' in anew and b'"id":"a"' in anew
    assert b'"prompt_token_ids":null' in on
