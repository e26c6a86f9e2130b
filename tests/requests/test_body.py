"""A client's body: what is read of it, what is taken out, and that everything else stays unchanged."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.errors import InvalidRequest
from pd_proxy.requests.body import Endpoint, read_body
from pd_proxy.requests.members import FORBIDDEN

from tests.requests.helpers import chat, completion, raw

# Bodies that are invalid


@pytest.mark.parametrize(
    "body",
    [
        b"hello",
        b"{",
        b'{"model":',
        b'{"model":"a"',
        b'{"model":"a",}',
        b'{"a":1}{"b":2}',
        b'{"a":nope}',
        b"{'a':1}",
        b'{"a":1}\x00',
        b'{"a":"half a pair: \\ud800"}',
        b'{"vllm_xargs":{"a":}}',
        b"\xff\xfe{\x00}\x00",
    ],
)
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        read_body(body, "chat")


@pytest.mark.parametrize("body", [b"[]", b"null", b"1", b'"text"', b"true", b'[{"model":"a"}]'])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="must be a JSON object"):
        read_body(body, "chat")


@pytest.mark.parametrize("body", [b'{"prompt":' + b"[" * 100_000, b'{"a":' + b'{"a":' * 100_000])
def test_a_body_nested_without_end_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="too deeply"):
        read_body(body, "completions")


@pytest.mark.parametrize("name", ["vllm_xargs", "stream_options", "prompt", "messages", "anything"])
def test_deep_nesting_is_refused_or_read_but_never_fatal(name: str) -> None:
    for depth in (100, 400, 490, 495, 500, 600, 900, 990, 1100, 5000):
        body = b'{"%b":%b1%b}' % (name.encode(), b'{"a":' * depth, b"}" * depth)
        try:
            assert name in read_body(body, "completions").members
        except InvalidRequest:
            assert depth > 100


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stream", "maybe"),
        ("stream", 2),
        ("stream", []),
        ("n", "two"),
        ("n", 1.5),
        ("n", [1]),
        ("max_tokens", "10.5"),
        ("max_tokens", 10.5),
        ("max_tokens", {}),
        ("model", 7),
        ("model", ["a"]),
        ("stream_options", "usage"),
        ("stream_options", [1]),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_by_its_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"`{name}` must be an? ") as caught:
        completion(**{name: value})
    assert caught.value.param == name
    assert caught.value.status == 400


def test_max_completion_tokens_is_read_for_chat_only() -> None:
    with pytest.raises(InvalidRequest, match="max_completion_tokens"):
        chat(max_completion_tokens="ten")
    assert completion(max_completion_tokens="ten").max_tokens == 16


@pytest.mark.parametrize("body", [b'{"model":"\xff"}', b'{"stream_options":{"a":"\xff"}}'])
def test_text_that_is_not_utf8_in_a_field_the_gateway_reads_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_body(body, "chat")


def test_a_number_out_of_range_in_a_nested_object_is_not_reported_as_a_body_that_is_no_object() -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_body(b'{"vllm_xargs":{"a":1e400}}', "chat")
    assert "must be a JSON object" not in str(caught.value)


# What is read


def test_the_members_that_the_gateway_needs_are_read() -> None:
    body = chat(model="m", stream=True, stream_options={"include_usage": True}, max_tokens=7, messages=[])
    assert (body.model, body.stream, body.wants_usage, body.max_tokens, body.unsplittable) == ("m", True, True, 7, "")


def test_missing_members_have_the_engines_defaults() -> None:
    for body in (chat(), chat(model=None, stream=None, n=None, max_tokens=None, stream_options=None)):
        assert (body.model, body.stream, body.wants_usage, body.max_tokens, body.unsplittable) == (
            None,
            False,
            False,
            None,
            "",
        )
    assert completion(prompt="a").max_tokens == 16


@pytest.mark.parametrize(
    ("members", "bound"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": None}, 5),
    ],
)
def test_for_chat_max_completion_tokens_wins(members: dict[str, Any], bound: int) -> None:
    assert chat(**members).max_tokens == bound


@pytest.mark.parametrize(("options", "wants"), [({}, False), ({"include_usage": False}, False), (None, False)])
def test_a_client_that_did_not_ask_for_usage_does_not_want_it(options: object, wants: bool) -> None:
    assert chat(stream=True, stream_options=options).wants_usage is wants


def test_of_a_repeated_member_only_the_last_counts_and_stays() -> None:
    body = read_body(b'{"model":"a","x":1,"stream":true,"model":"b","x":2,"stream":false}', "chat")
    assert (body.model, body.stream) == ("b", False)
    assert {name: bytes(value) for name, value in body.members.items()} == {
        "model": b'"b"',
        "x": b"2",
        "stream": b"false",
    }


# What is taken out


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_hand_off_members_of_clients_are_removed(name: str) -> None:
    secret = {"remote_host": "evil"}
    body = chat(messages=[], **{name: secret})
    assert set(body.members) == {"messages"}
    twice = b'{"%b":1,"messages":[],"%b":2}' % (name.encode(), name.encode())
    assert set(read_body(twice, "chat").members) == {"messages"}
    escaped = b'{"\\u%04x%b":1,"messages":[]}' % (ord(name[0]), name[1:].encode())
    assert set(read_body(escaped, "chat").members) == {"messages"}


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
@pytest.mark.parametrize(
    "nest",
    [
        lambda value: {"vllm_xargs": value},
        lambda value: {"extra_args": value},
        lambda value: {"sampling_params": value},
        lambda value: {"sampling_params": {"extra_args": value}},
        lambda value: {"vllm_xargs": {"a": {"b": value}}},
    ],
    ids=["vllm_xargs", "extra_args", "sampling_params", "sampling_params.extra_args", "deeper"],
)
def test_hand_off_members_are_removed_from_objects_that_engines_merge_into_arguments(name: str, nest: Any) -> None:
    value = {name: {"remote_host": "evil"}, "kept": [1, {"x": None}]}
    assert b"evil" not in b"".join(bytes(v) for v in chat(**nest(value)).members.values())
    members = {k: json.loads(bytes(v)) for k, v in chat(**nest(value)).members.items()}
    assert members == nest({"kept": [1, {"x": None}]})


def test_a_forbidden_name_in_a_text_or_a_tool_stays() -> None:
    tools = [{"function": {"parameters": {"properties": {"request_id": {}, "kv_transfer_params": {}}}}}]
    messages = [{"role": "user", "content": "kv_transfer_params"}]
    body = chat(messages=messages, tools=tools, metadata={"rid": "7"})
    assert json.loads(raw(body, "tools")) == tools
    assert json.loads(raw(body, "messages")) == messages
    assert json.loads(raw(body, "metadata")) == {"rid": "7"}


@pytest.mark.parametrize("value", ["text", 7, None, [1], True])
def test_a_nested_member_of_another_type_is_left_to_the_engine(value: object) -> None:
    assert json.loads(raw(chat(vllm_xargs=value), "vllm_xargs")) == value


# What stays unchanged


ODD = [
    b"1.10",
    b"1e2",
    b"-0.0",
    b"12345678901234567890123",
    b"1e400",
    b'"\\u00e9\\/\\ud83d\\ude00"',
    b'{ "spaces" : [ 1 , 2 ] , "twice":1,"twice":2 }',
    b"[[[]]]",
    b"null",
    '"é😀"'.encode(),
]


@pytest.mark.parametrize("value", ODD)
def test_a_field_the_gateway_does_not_know_stays_byte_for_byte(value: bytes) -> None:
    body = read_body(b'{"odd": %b , "messages":[]}' % value, "chat")
    assert raw(body, "odd") == value


def test_large_messages_are_not_written_anew() -> None:
    messages = b'[ {"role" : "user", "content":"%b\\u00e9\\/"} ]' % (b"word " * 100_000)
    body = read_body(b'{"model":"m","messages":' + messages + b"}", "chat")
    assert raw(body, "messages") == messages


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
READ = {"stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "model", "sampling_params"}
NAMES = st.text(max_size=8).filter(lambda name: name not in READ | FORBIDDEN)


@given(st.dictionaries(NAMES, JSON, max_size=6), st.sampled_from(["chat", "completions"]))
def test_any_unknown_members_pass_through(members: dict[str, Any], endpoint: Endpoint) -> None:
    body = read_body(json.dumps(members).encode(), endpoint)
    assert {name: json.loads(bytes(value)) for name, value in body.members.items()} == members


@given(st.binary(max_size=60) | st.text('{}[]",:0123456789.eE+-\\u truefalsn', max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        read_body(body, "completions")
    except InvalidRequest as error:
        assert error.status == 400
        json.loads(error.body())


# Requests that one backend serves alone


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"n": 1}, ""),
        ({"n": None}, ""),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt_logprobs": 5}, "prompt_logprobs"),
        ({"prompt_logprobs": None}, ""),
        ({"echo": True}, "echo"),
        ({"echo": False}, ""),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"use_beam_search": False}, ""),
        ({"truncate_prompt_tokens": 100}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": None}, ""),
        ({"logprobs": True, "top_logprobs": 3}, ""),
    ],
)
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_an_unsplittable_request_has_a_reason(members: dict[str, Any], reason: str, endpoint: Endpoint) -> None:
    assert read_body(json.dumps(members).encode(), endpoint).unsplittable == reason


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (b'"text"', ""),
        (b'["text"]', ""),
        (b'["a","b"]', "prompt_list"),
        (b"[1,2,3]", ""),
        (b"[ \n1, 2]", ""),
        (b"[[1,2,3]]", ""),
        (b"[[1,2],[3]]", "prompt_list"),
        (b" [ [1] , [2] ]", "prompt_list"),
        (b"[]", "prompt_list"),
        (b"null", ""),
        (b'"[1, 2]"', ""),
        (b'{"prompt_embeds":1}', ""),
    ],
)
def test_several_prompts_are_served_by_one_backend(prompt: bytes, reason: str) -> None:
    assert read_body(b'{"prompt":' + prompt + b"}", "completions").unsplittable == reason


@pytest.mark.parametrize("other", ["echo", "prompt_logprobs"])
def test_several_prompts_are_the_last_reason_since_some_connectors_split_them(other: str) -> None:
    assert completion(prompt=["a", "b"], **{other: 1}).unsplittable == other


def test_a_chat_has_no_prompt_list() -> None:
    assert chat(prompt=["a", "b"], messages=[]).unsplittable == ""


# The estimate of a prompt's length


def test_a_prompt_is_estimated_at_a_token_for_four_bytes() -> None:
    assert 200 < completion(prompt="word " * 200).prompt_tokens < 300
    assert 10_000 < chat(messages=[{"role": "user", "content": "word " * 10_000}]).prompt_tokens < 15_000
    assert completion().prompt_tokens >= 1


def test_token_ids_are_counted() -> None:
    assert completion(prompt=list(range(100_000, 110_000))).prompt_tokens == 10_000


def test_tools_are_a_part_of_the_prompt() -> None:
    tools = [{"function": {"description": "word " * 1000}}]
    assert chat(messages=[], tools=tools).prompt_tokens > chat(messages=[]).prompt_tokens + 1000


def test_an_image_is_a_thousand_tokens_whatever_its_size() -> None:
    def with_image(size: int) -> int:
        part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * size}}
        return chat(messages=[{"role": "user", "content": [part, part, {"type": "text", "text": "hi"}]}]).prompt_tokens

    assert 2000 <= with_image(20_000) <= 2200
    assert with_image(20_000) == with_image(2_000_000)


@given(st.integers(0, 60_000))
def test_a_longer_prompt_is_never_estimated_to_be_shorter(size: int) -> None:
    assert completion(prompt="a" * size).prompt_tokens <= completion(prompt="a" * (size + 400)).prompt_tokens


# Inputs that engines accept as well


def test_a_byte_order_mark_is_skipped() -> None:
    body = read_body(b'\xef\xbb\xbf{"model":"m","messages":[]}', "chat")
    assert body.model == "m"
    assert set(body.members) == {"model", "messages"}


@pytest.mark.parametrize("text", [b"", b" ", b"\r\n\t ", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_an_empty_body_is_reported_as_empty(text: bytes, kind: type[bytes]) -> None:
    with pytest.raises(InvalidRequest, match="the request body is empty"):
        read_body(kind(text), "chat")


@pytest.mark.parametrize(
    ("name", "said", "read", "written"),
    [
        ("max_tokens", 16.0, 16, b"16"),
        ("max_tokens", "16", 16, b"16"),
        ("max_tokens", " 16.0 ", 16, b"16"),
        ("max_completion_tokens", 1e2, 100, b"100"),
        ("n", "1", None, b"1"),
        ("n", True, None, b"1"),
        ("min_tokens", "2", None, b"2"),
        ("stream", "true", True, b"true"),
        ("stream", 1, True, b"true"),
        ("stream", 0.0, False, b"false"),
        ("stream", "No", False, b"false"),
        ("return_token_ids", "on", None, b"true"),
        ("stream_options", {"include_usage": "true", "more": 1}, None, b'{"include_usage":true,"more":1}'),
        ("stream_options", {"include_usage": 0}, None, b'{"include_usage":false}'),
        ("stream_options", {"continuous_usage_stats": "f"}, None, b'{"continuous_usage_stats":false}'),
    ],
)
def test_numbers_and_flags_that_engines_accept_in_other_forms_are_normalised(
    name: str, said: Any, read: Any, written: bytes
) -> None:
    body = chat(**{name: said})
    assert raw(body, name) == written
    if read is not None:
        assert getattr(body, name.replace("completion_", "")) == read
    if name == "stream_options":
        assert body.wants_usage is (b'include_usage":true' in written)


def test_an_invalid_flag_in_stream_options_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"`stream_options\.include_usage` must be a boolean"):
        chat(stream_options={"include_usage": "perhaps"})
