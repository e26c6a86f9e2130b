"""The bounds on a body's members, and hand-off members at any depth."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pd_proxy.errors import InvalidRequest
from pd_proxy.requests.body import read_body

from tests.requests.helpers import chat, raw

# Members that are bounded in number


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "m" * 10_000),
        ("n", " " * 70_000),
        ("stream_options", {"a": "b" * 70_000}),
        ("stop", ["a"] * 80_000),
        ("metadata", {"a": "b" * 300_000}),
        ("vllm_xargs", {"a": [[]] * 1_200_000}),
        ("sampling_params", [{}] * 1_200_000),
        ("logit_bias", {"1": "x" * 9_000_000}),
        ("tools", ["x" * 9_000_000]),
    ],
)
def test_members_that_are_small_by_nature_are_bounded_and_the_error_has_the_bound(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"`{name}` is longer than \d+ bytes") as refused:
        chat(messages="x" * 100_000, **{name: value})
    assert refused.value.param == name


def test_a_list_as_long_as_a_vocabulary_is_accepted() -> None:
    tokens = list(range(151_936))
    body = chat(
        vllm_xargs={"tokens": tokens}, logit_bias={str(token): -1.5 for token in tokens}, allowed_token_ids=tokens
    )
    assert json.loads(raw(body, "vllm_xargs"))["tokens"] == tokens


def test_the_number_of_a_bodys_members_is_bounded() -> None:
    for size in (2_000, 100_000):
        with pytest.raises(InvalidRequest, match="more than 1024 members"):
            chat(**{f"a{number}": number for number in range(size)})


# Hand-off members, at any depth


@pytest.mark.parametrize("member", ["vllm_xargs", "extra_args", "sampling_params"])
@pytest.mark.parametrize(
    "shape",
    ['[{"%s":1,"b":2}]', '[[{"%s":1}]]', '{"a":[[{"%s":{}}]]}', '{"a":[0,{"b":[{"%s":[]}]}]}', '[[[[{"%s":1}]]]]'],
)
@pytest.mark.parametrize("spelling", ["kv_transfer_params", "\\u006bv_transfer_params", "kv\\u005Ftransfer_params"])
def test_hand_off_fields_in_lists_reach_no_engine(member: str, shape: str, spelling: str) -> None:
    body = read_body(f'{{"{member}":{shape % spelling}}}'.encode(), "chat")
    assert b"transfer_params" not in raw(body, member)


@pytest.mark.parametrize("spelling", ["kv_transfer_params", "\\u006bv_transfer_params", "\\u006Bv_transfer_params"])
def test_hand_off_fields_in_lists_that_are_too_long_to_be_read_are_refused(spelling: str) -> None:
    said = f'{{"vllm_xargs":{{"a":["{"x" * 70_000}",{{"{spelling}":1}}]}}}}'
    with pytest.raises(InvalidRequest, match="names in it that no client may use"):
        read_body(said.encode(), "chat")


@pytest.mark.parametrize("depth", [10, 200, 450, 490, 900, 50_000])
def test_lists_in_lists_are_read_or_refused_but_never_fatal(depth: int) -> None:
    try:
        body = read_body(b'{"vllm_xargs":' + b"[" * depth + b'{"rid":1}' + b"]" * depth + b"}", "chat")
        assert b"rid" not in raw(body, "vllm_xargs")
    except InvalidRequest:
        assert depth > 200
