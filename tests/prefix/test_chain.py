"""Prompts as chains of hashes."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from itertools import pairwise
from time import process_time
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pd_proxy.prefix.blocks import IDS
from pd_proxy.prefix.chain import EMPTY, Chain, chain_of, chain_of_ids, link_ids, root_of_ids
from pd_proxy.requests.body import read_body
from pd_proxy.requests.endpoints import Endpoint

KEY = b"k" * 16
WORDS = [word * 3 for word in ("alpha ", "beta ", "gamma ", "delta ")]


def text(size: int, seed: int = 0) -> str:
    chosen = random.Random(seed)
    return "".join(chosen.choice(WORDS) for _ in range(size // 12))[:size]


def message(role: str, size: int, seed: int = 0) -> dict[str, Any]:
    return {"role": role, "content": text(size, seed)}


def chain(body: Mapping[str, Any], endpoint: Endpoint = "chat", earlier: Chain | None = None) -> Chain:
    return chain_of(read_body(msgspec.json.encode(body), endpoint), KEY, earlier)


def shared(one: Chain, other: Chain) -> int:
    """How many first blocks two prompts share."""
    count = 0
    for left, right in zip(one.hashes, other.hashes, strict=False):
        if left != right:
            break
        count += 1
    return count


TURNS = [message("system", 2000, 1), message("user", 3000, 2), message("assistant", 2500, 3), message("user", 900, 4)]


def test_a_conversation_shares_all_whole_blocks_with_its_earlier_turns() -> None:
    chains = [chain({"model": "m", "messages": TURNS[:count]}) for count in (1, 2, 4)]
    for earlier, later in pairwise(chains):
        assert 0 < len(earlier.hashes) < len(later.hashes)
        assert shared(earlier, later) == len(earlier.hashes)


def test_the_closing_bracket_does_not_change_a_block_that_ends_with_the_last_message() -> None:
    for size in range(400, 500):
        first = {"role": "user", "content": "x" * size}
        short, long = (chain({"messages": [first, *more]}) for more in ((), (message("user", 2000),)))
        assert shared(short, long) == len(short.hashes) == (short.units >= 512)


def test_blanks_before_the_closing_bracket_are_no_part_of_the_prompt() -> None:
    body = b'{"messages": [\n  {"content": "%b"}\n]}' % (b"x" * 600)
    longer = b'{"messages": [\n  {"content": "%b"},\n  {"content": "y"}\n]}' % (b"x" * 600)
    short, long = (chain_of(read_body(raw, "chat"), KEY) for raw in (body, longer))
    assert len(short.hashes) == shared(short, long) == 1


def test_prompts_share_the_blocks_before_their_first_difference_and_none_behind_it() -> None:
    ways = [
        chain({"messages": [message("system", 5000), message("user", 5000, seed), message("user", 5000)]})
        for seed in (1, 2)
    ]
    assert 9 <= shared(*ways) <= 10
    assert set(ways[0].hashes[10:]).isdisjoint(ways[1].hashes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "adapter"),
        ("cache_salt", "tenant"),
        ("chat_template", "{{ x }}"),
        ("chat_template_kwargs", {"thinking": True}),
        ("add_generation_prompt", False),
        ("continue_final_message", True),
        ("documents", [{"text": "x"}]),
        ("reasoning_effort", "low"),
        ("mm_processor_kwargs", {"x": 1}),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "none"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("lora_path", "x"),
    ],
)
def test_members_that_shape_the_whole_prompt_change_all_its_hashes(name: str, value: Any) -> None:
    body = {"model": "m", "messages": TURNS}
    assert shared(chain(body), chain({**body, name: value})) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.5),
        ("max_tokens", 7),
        ("stream", True),
        ("user", "u"),
        ("tool_choice", "auto"),
        ("cache_salt", None),
    ],
)
def test_members_that_shape_only_the_answer_change_no_hash(name: str, value: Any) -> None:
    body = {"model": "m", "messages": TURNS}
    assert chain({**body, name: value}) == chain(body)


def test_names_and_values_are_hashed_separately() -> None:
    body = {"messages": TURNS}
    ways = [
        chain({**body, "cache_salt": "a", "chat_template": "b"}),
        chain({**body, "cache_salt": "b", "chat_template": "a"}),
        chain({**body, "cache_salt": 'a"\0chat_template\0"b'}),
        chain({"tools": TURNS, "messages": TURNS}, "messages"),
        chain({"system": TURNS, "messages": TURNS}, "messages"),
    ]
    assert len({one.hashes[0] for one in ways}) == len(ways)


def test_another_key_makes_other_hashes() -> None:
    body = read_body(msgspec.json.encode({"messages": TURNS}), "chat")
    assert set(chain_of(body, KEY).hashes).isdisjoint(chain_of(body, b"l" * 16).hashes)


def test_tools_and_system_come_before_the_messages() -> None:
    tools = [{"name": "f", "description": text(4000)}]
    ways = [
        chain({"tools": tools, "system": text(3000), "messages": [message("user", 3000, seed)]}, "messages")
        for seed in (1, 2)
    ]
    assert 13 <= shared(*ways) <= 14


def test_a_prompt_of_text_shares_its_blocks_with_a_longer_one() -> None:
    short, long = chain({"prompt": text(3000)}, "completions"), chain({"prompt": text(9000)}, "completions")
    assert shared(short, long) == len(short.hashes) == 5


def test_the_first_prompt_of_a_batch_shares_its_blocks_with_the_same_prompt_alone() -> None:
    alone = chain({"prompt": text(3000)}, "completions")
    batch = chain({"prompt": [text(3000), text(3000, 2)]}, "completions")
    assert shared(alone, batch) == len(alone.hashes)
    assert len(batch.hashes) == 11


@pytest.mark.parametrize("blank", [b"", b" ", b"\n  "])
@pytest.mark.parametrize(
    ("endpoint", "name", "opening", "closing"),
    [
        ("completions", "prompt", b"[", b"]"),
        ("completions", "prompt", b"[[", b"]]"),
        ("generate", "token_ids", b"[", b"]"),
        ("sglang_generate", "input_ids", b"[", b"]"),
    ],
)
def test_ids_are_hashed_as_ids_however_they_are_written(
    endpoint: Endpoint, name: str, opening: bytes, closing: bytes, blank: bytes
) -> None:
    ids = [number * 31 % 50_000 for number in range(100)]
    listed = (b"," + blank).join(b"%d" % one for one in ids)
    raw = b'{"model": "m", "%b": %b%b%b%b%b}' % (name.encode(), opening, blank, listed, blank, closing)
    found = chain_of(read_body(raw, endpoint), KEY)
    assert found == chain_of_ids(ids, root_of_ids("m", KEY), KEY)
    assert (found.tokens, found.exact, len(found.hashes), found.block_tokens) == (100, True, 6, 16.0)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 2047, 2048, 2049, 2111, 2112, 2113, 8191, 8192, 8200, 40_000])
@pytest.mark.parametrize("widths", [(1, 10), (1, 10**9), (10**9, 2**32)])
def test_a_block_of_ids_is_linked_to_the_one_before_it(count: int, widths: tuple[int, int]) -> None:
    chosen = random.Random(count)
    ids = [chosen.randrange(*widths) for _ in range(count)]
    if widths[1] == 10**9:
        ids = [1] * (count // 2) + ids[count // 2 :]  # so that a number's mean length changes
    previous = root_of_ids("m", KEY, "salt")
    whole = chain({"model": "m", "prompt": ids, "cache_salt": "salt"}, "completions")
    start = 0
    for end, hashed in zip(IDS.ends, whole.hashes, strict=False):
        previous = link_ids(previous, ids[start:end], KEY)
        assert previous == hashed
        start = end
    assert len(whole.hashes) == IDS.whole(count)
    assert whole.units == whole.tokens == count or count == 0
    assert whole == chain_of_ids(ids, whole.root, KEY) or count == 0


def test_ids_have_a_root_for_each_model_and_salt() -> None:
    roots = {root_of_ids(model, KEY, salt) for model in "mn" for salt in ("", "salt")}
    assert len(roots) == 4


@pytest.mark.parametrize("prompt", [[1, -2] * 500, [1, 2**33] * 500, [1, 2.5] * 500, [1, "2"] * 500, [[1], [2]] * 300])
def test_a_list_that_is_no_prompt_of_ids_is_hashed_nevertheless(prompt: list[Any]) -> None:
    """Its engine says what is wrong with it."""
    found, other = chain({"prompt": prompt}, "completions"), chain({"prompt": [*prompt, 1]}, "completions")
    assert shared(found, other) == len(found.hashes) > 1


@pytest.mark.parametrize("ids", [[-1], [2**32], [10**30]])
def test_an_invalid_id_is_refused(ids: list[int]) -> None:
    with pytest.raises(OverflowError):
        chain_of_ids(ids, 0, KEY)
    with pytest.raises(OverflowError):
        link_ids(0, ids, KEY)


@pytest.mark.parametrize("body", [{}, {"messages": None}, {"prompt": None}, {"messages": []}, {"messages": [{}]}])
@pytest.mark.parametrize("endpoint", ["chat", "completions", "messages", "responses", "generate", "sglang_generate"])
def test_a_body_without_a_prompt_has_no_blocks(body: dict[str, Any], endpoint: Endpoint) -> None:
    assert chain(body, endpoint).hashes == EMPTY.hashes


def test_members_of_other_endpoints_are_no_prompt() -> None:
    ways = [chain({"prompt": text(3000, seed), "messages": TURNS}, "completions") for seed in (1, 2)]
    assert shared(*ways) == 0
    assert chain({"text": text(3000), "input_ids": [1] * 100}, "sglang_generate").exact is False
    assert chain({"text": None, "input_ids": [1] * 100}, "sglang_generate").tokens == 100


def test_the_number_of_tokens_is_the_bodys_estimate() -> None:
    raw = read_body(msgspec.json.encode({"messages": TURNS}), "chat")
    found = chain_of(raw, KEY)
    assert found.tokens == raw.prompt_tokens
    assert found.tokens_of(0) == 0
    assert 0.9 * found.tokens < found.tokens_of(len(found.hashes)) <= found.tokens
    assert 120 < found.block_tokens < 136


def picture(seed: int, size: int = 60_000) -> dict[str, Any]:
    data = base64.b64encode(random.Random(seed).randbytes(size)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def test_an_image_is_hashed_by_its_bytes_and_counts_as_several_blocks() -> None:
    def ask(*images: dict[str, Any]) -> Chain:
        parts = [{"type": "text", "text": text(20_000)}, *images, {"type": "text", "text": text(4000, 9)}]
        return chain({"messages": [{"role": "user", "content": parts}]})

    one, again, other, two = ask(picture(1)), ask(picture(1)), ask(picture(2)), ask(picture(1), picture(3))
    assert one == again
    assert one.units < 30_000
    share = one.tokens_of(shared(one, other))
    assert 0.8 * 5000 < share < 1.1 * 5000, "the text before the image, and not a share of the image's bytes"
    assert one.tokens_of(shared(one, two)) > share + 900, "text and image"


def test_an_image_behind_a_url_is_hashed_by_the_url() -> None:
    def ask(url: str) -> Chain:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text(4000)}]
        return chain({"messages": [{"role": "user", "content": parts}]})

    assert shared(ask("http://a/1.png"), ask("http://a/2.png")) == 0
    assert ask("http://a/1.png") == ask("http://a/1.png")


def respond(text: str, follows: str = "", earlier: Chain | None = None, **more: Any) -> Chain:
    body = {"model": "m", "input": text, **more}
    return chain({**body, "previous_response_id": follows} if follows else body, "responses", earlier)


def test_a_response_continues_the_chain_of_the_earlier_one() -> None:
    first = respond(text(3000), instructions=text(1000))
    second = respond(text(2000, 2), "resp_1", first, instructions=text(1000))
    third = respond(text(2000, 3), "resp_2", second, instructions=text(1000))
    assert shared(first, second) == len(first.hashes) == 7
    assert shared(second, third) == len(second.hashes) > len(first.hashes)
    assert second.tokens > first.tokens + 400
    assert second == respond(text(2000, 2), "resp_1", first, instructions=text(1000))
    assert shared(second, respond(text(2000, 2), "resp_other", first, instructions=text(1000))) == len(first.hashes)


def test_a_response_with_other_instructions_begins_anew() -> None:
    first = respond(text(3000), instructions=text(1000))
    for other in (
        respond(text(2000), "resp_1", first),
        respond(text(2000), "resp_1", first, instructions=text(1000), tools=[{"name": "f"}]),
        respond(text(2000), "resp_1", first, instructions=text(1000), cache_salt="x"),
        respond(text(2000), "resp_1", None, instructions=text(1000)),
    ):
        assert shared(first, other) == 0
        assert other.hashes


@settings(max_examples=25)
@given(st.lists(st.text(max_size=400), min_size=1, max_size=8), st.integers(0, 8))
def test_any_conversation_shares_its_beginning(contents: list[str], count: int) -> None:
    messages = [{"role": "user", "content": content * 3} for content in contents]
    part, whole = chain({"messages": messages[: max(1, count)]}), chain({"messages": messages})
    assert shared(part, whole) == min(len(part.hashes), len(whole.hashes))
    assert len(whole.hashes) == whole.blocks.whole(whole.units)


@pytest.mark.parametrize("body", [b'{"text":[{}%b]}', b'{"text":[%b{}]}', b'{"text":"a%b"}', b'{"text":[%b]}'])
def test_blanks_are_skipped_without_a_step_for_each(body: bytes) -> None:
    """A client can send megabytes of blanks, and the event loop does nothing else meanwhile."""
    text = read_body(body % (b" " * 4_000_000), "sglang_generate")
    began = process_time()
    chain_of(text, KEY)
    assert process_time() - began < 0.1
