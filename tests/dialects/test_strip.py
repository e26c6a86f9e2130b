"""The members of a hand-off that no client may see."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.decoding import Undecodable
from pd_proxy.dialects.edit import Edit
from pd_proxy.dialects.registry import DIALECTS
from pd_proxy.dialects.strip import HANDOFF_FIELDS, names_handoff, strip_event, strip_handoff

from tests.relay.streams import HIDE, event, identity, opened

ADDRESS = "10.0.0.7"


@pytest.mark.parametrize("field", ["kv_transfer_params", "ec_transfer_params"])
def test_the_hand_off_is_taken_out_of_an_answer_and_the_rest_stays_byte_for_byte(field: str) -> None:
    kept = b'{"id":"a","x":1.10,"choices":[{"text":"\\u00e9\\/","n":1e2}]}'
    given_ = kept[:-1] + b',"' + field.encode() + b'":{"remote_host":"10.0.0.1","deep":[{"a":[]}]}}'
    assert strip_handoff(given_) == kept


def test_the_hand_off_is_taken_out_of_choices_too() -> None:
    kept = b'{"id":"a","choices":[{"text":"\\u00e9\\/","n":1e2},{"text":"b"}],"x":1.10}'
    given_ = kept.replace(b'"}', b'","disaggregated_params":{"ctx_info_endpoint":"10.0.0.1"}}')
    given_ = given_.replace(b"1e2}", b'1e2,"disaggregated_params":null}')
    assert strip_handoff(given_) == kept


@pytest.mark.parametrize("choices", [b"7", b"null", b"[1]", b'"x"'])
def test_a_clients_own_words_are_left_alone(choices: bytes) -> None:
    body = b'{"choices":' + choices + b',"tools":[{"disaggregated_params":1}]}'
    assert strip_handoff(body) == body


@pytest.mark.parametrize(
    "where", [b'{"error":%b}', b'{"choices":[1,%b]}', b'{"message":%b}', b'{"response":%b}', b"[%b]"]
)
def test_the_hand_off_is_taken_out_wherever_engines_answer(where: bytes) -> None:
    inner = b'{"kv_transfer_params":1,"a":1e2,"disaggregated_params":2}'
    assert strip_handoff(where % inner) == where % b'{"a":1e2}'


@pytest.mark.parametrize(
    "name",
    [
        rb"kv\u005ftransfer_params",
        rb"kv_transfer\u005Fparams",
        rb"\u006bv_transfer_params",
        rb"kv_transfer_param\u0073",
        rb"\u0065c_transfer_params",
        rb"".join(b"\\u%04x" % letter for letter in b"kv_transfer_params"),
    ],
)
@pytest.mark.parametrize(
    "form", [b'{"%b":%b,"a":1}', b'{"a":1,"choices":[{"%b":%b}]}', b'[{"%b":%b}]', b'{"message":{"%b" : %b}}']
)
def test_the_hand_off_is_taken_out_however_its_name_is_spelled(name: bytes, form: bytes) -> None:
    shown = strip_handoff(form % (name, b'{"remote_host":"10.0.0.1"}'))
    assert b"10.0.0.1" not in shown
    assert b"remote_host" not in shown


def test_data_that_may_have_a_hand_off_and_is_not_json_is_not_passed_on() -> None:
    with pytest.raises(Undecodable):
        strip_handoff(b'{"kv_transfer_params":{"remote_host":"10.0.0.1"},"a":')
    with pytest.raises(Undecodable):
        strip_handoff(b'{"kv_transfer_params":{"remote_host":"10.0.0.1"},"caf\xe9":1}')


def test_escapes_of_other_letters_cost_no_decoding_and_change_nothing() -> None:
    body = b'{"text":"\\u00e9\\u000a\\u003c","n":1e2}'
    assert strip_handoff(body) is body


@pytest.mark.parametrize("body", [b'{"a":1}', b"", b"<html>", b'{ "spaces" : [ ] }', b'{"text":"kv_transfer_params"}'])
def test_a_body_without_a_hand_off_is_not_touched(body: bytes) -> None:
    assert strip_handoff(body) == body


# Events


@pytest.mark.parametrize("name", [b"", b"message_start"])
def test_an_event_is_stripped_as_an_answer_is(name: bytes) -> None:
    head = b"event: %b\n" % name if name else b""
    payload = b'{"kv_transfer_params":1,"a":1e2,"choices":[{"disaggregated_params":2}]}'
    shown = strip_event(head + b"data: %b\n\n" % payload, payload, name)
    assert shown == head + b'data: {"a":1e2,"choices":[{}]}\n\n'


@pytest.mark.parametrize(
    "untouched", [b": kv_transfer_params\n\n", b"data:  {}\n\n", b"data: [DONE]\n\n", b"id: 1\r\n\r\n"]
)
def test_an_event_that_names_no_hand_off_is_not_touched(untouched: bytes) -> None:
    assert strip_event(untouched, untouched.removeprefix(b"data: ").strip()) is untouched


def test_an_event_that_may_carry_a_hand_off_and_is_no_json_is_not_given_on() -> None:
    payload = b'{"kv_transfer_params":{"remote_host":"10.0.0.1"},"a":'
    with pytest.raises(Undecodable):
        strip_event(b"data: %b\n\n" % payload, payload)


# Whatever an engine answers, through every dialect

handoffs = st.dictionaries(st.sampled_from(sorted(HANDOFF_FIELDS)), st.just({"remote_host": ADDRESS}), max_size=3)


def answer(data: st.DataObject, **members: Any) -> dict[str, Any]:
    """An object of an engine's, with a hand-off wherever one may stand."""
    return {**members, **data.draw(handoffs)}


@pytest.mark.parametrize(
    "edit", [Edit(), HIDE, Edit(identity=identity(id="x"), earlier_tokens=3)], ids=["as is", "ids", "resumed"]
)
@pytest.mark.parametrize("endpoint", DIALECTS)
@given(data=st.data())
async def test_no_event_of_any_dialect_shows_a_hand_off(endpoint: str, edit: Edit, data: st.DataObject) -> None:
    inner = {
        "choices": [answer(data, index=index, delta={"content": "a"}, token_ids=[5]) for index in range(2)],
        "message": answer(data, id="m", content=[]),
        "response": answer(data, id="r", output=[], error=None),
        "meta_info": {"prompt_tokens": 1, "completion_tokens": 1},
    }
    kind = {"messages": "content_block_delta", "responses": "response.output_text.delta"}.get(endpoint, "x")
    stream = await opened(edit=edit, dialect=DIALECTS[endpoint], finished=False)
    for _ in range(data.draw(st.integers(1, 3))):
        stream.read(event(answer(data, type=kind, delta={"text": "a"}, **inner)))
    assert stream.client.body.startswith((b"data: {", b"event: ")) and ADDRESS.encode() not in stream.client.body
    stream.running.cancel()


@given(data=st.data())
def test_no_whole_answer_shows_a_hand_off(data: st.DataObject) -> None:
    choice = answer(data, index=0, message=answer(data, content="a"))
    body = json.dumps(
        answer(data, choices=[choice], error=answer(data, code=1), response=answer(data, id="r"))
    ).encode()
    shown = strip_handoff(body)
    assert not names_handoff(shown) and ADDRESS.encode() not in shown
    assert json.loads(shown)["choices"][0]["message"]["content"] == "a"
