"""What the gateway relies on in vLLM's wire format, checked against the engines themselves.

Where these tests fail after an upgrade of vLLM, the gateway's relay and its hand-off are affected.
"""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from pd_proxy.fleet.health.fingerprints import counted, speaker
from pd_proxy.handoff.connectors.registry import CONNECTORS

from .bed import Bed
from .engines import MODEL_NAME, Engine
from .processes import wait_until
from .questions import Api, as_answer, ask, asked, body_for, events, long_body, prompt_of, streaming

pytestmark = pytest.mark.real

APIS = pytest.mark.parametrize("api", Api, ids=lambda api: api.name.lower())
HEAD = rb'data: \{"id":"[\w-]+","object":"%b","created":\d+,"model":"tiny","choices":\[\{"index":0,'
TEXT = rb'"(?:[^"\\]|\\.)*"'
TOKEN_EVENT = {
    Api.CHAT: HEAD % rb"chat\.completion\.chunk"
    + rb'"delta":\{"content":%b\},"logprobs":null,"finish_reason":null,"token_ids":\[[\d,]+\]\}\]\}\n\n' % TEXT,
    Api.COMPLETIONS: HEAD % b"text_completion"
    + rb'"text":%b,"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,' % TEXT
    + rb'"token_ids":\[[\d,]+\]\}\]\}\n\n',
}
FIRST_EVENT = {
    Api.CHAT: HEAD % rb"chat\.completion\.chunk"
    + rb'"delta":\{"role":"assistant","content":""\},"logprobs":null,"finish_reason":null\}\],'
    + rb'"prompt_token_ids":\[[\d,]+\],"prompt_text":null\}\n\n',
    Api.COMPLETIONS: HEAD % b"text_completion"
    + rb'"text":%b,"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":\[[\d,]+\],' % TEXT
    + rb'"token_ids":\[[\d,]+\]\}\]\}\n\n',
}
PULLED = 'prompt_tokens_by_source_total{source="external_kv_transfer"}'
TOOLS = [{"type": "function", "function": {"name": "weigh", "parameters": {"type": "object", "properties": {}}}}]


def streamed(engine: Engine, api: Api, body: dict[str, Any]) -> list[dict[str, Any]]:
    with streaming(engine.url, api, {**body, "return_token_ids": True}) as response:
        return list(events(response))


def ids_of(stream: list[dict[str, Any]]) -> list[int]:
    return [token for event in stream for choice in event["choices"] for token in choice.get("token_ids") or ()]


def prompt_ids_of(api: Api, stream: list[dict[str, Any]]) -> list[list[int]]:
    """The prompt's ids, as often as they are sent."""
    holders = stream if api is Api.CHAT else [choice for event in stream for choice in event["choices"]]
    return [holder["prompt_token_ids"] for holder in holders if holder.get("prompt_token_ids")]


def text_of(api: Api, choice: dict[str, Any]) -> str:
    return str(choice["text"] if api is Api.COMPLETIONS else choice["delta"].get("content", ""))


def chunks_of(url: str, api: Api, body: dict[str, Any]) -> list[bytes]:
    """The chunks of a streamed answer as they cross the wire, without their framing."""
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with asked(url, api, streamed) as connection:
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    rest = answer.partition(b"\r\n\r\n")[2]
    chunks = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        assert size == b"%x" % length  # the one canonical form
        assert rest[length : length + 2] == b"\r\n"
        chunks.append(rest[:length])
        rest = rest[length + 2 :]
    assert chunks.pop() == b""
    return chunks


@APIS
def test_each_event_is_one_chunk_and_those_of_tokens_are_alike(bed: Bed, api: Api) -> None:
    """The fast path of the relay compares bytes, so even the order of the members matters."""
    body = long_body(api, prompt_of(30, "shape"), 50, return_token_ids=True)
    first, *tokens, last, usage, done = chunks_of(bed.decode.url, api, body)
    assert re.fullmatch(FIRST_EVENT[api], first)
    assert tokens
    assert [event for event in tokens if not re.fullmatch(TOKEN_EVENT[api], event)] == []
    assert b'"finish_reason":"length"' in last
    assert b'"choices":[],"usage":{' in usage
    assert done == b"data: [DONE]\n\n"


@APIS
def test_every_token_has_its_id_once_and_the_prompts_ids_come_with_the_first_event(bed: Bed, api: Api) -> None:
    body = long_body(api, prompt_of(30, "ids"), 60)
    stream = streamed(bed.decode, api, body)
    usage = as_answer(api, stream).usage
    assert len(ids_of(stream)) == usage["completion_tokens"] == 60
    assert [len(ids) for ids in prompt_ids_of(api, stream)] == [usage["prompt_tokens"]]
    assert prompt_ids_of(api, stream[:1]) == prompt_ids_of(api, stream)


@APIS
def test_text_that_is_no_whole_character_yet_comes_with_a_later_token(bed: Bed, api: Api) -> None:
    """Bytes that make no character are frequent in the output of random weights."""
    stream = streamed(bed.decode, api, long_body(api, prompt_of(30, "held"), 200))
    choices = [choice for event in stream for choice in event["choices"]]
    assert [choice["token_ids"] for choice in choices if choice.get("token_ids") and not text_of(api, choice)]


@APIS
def test_text_that_may_begin_a_stop_string_is_held_back(bed: Bed, api: Api) -> None:
    stop = "no such words"
    stream = streamed(bed.decode, api, long_body(api, prompt_of(31, "stop"), 30, stop=[stop]))
    sent = stream[: len(stream) // 2]
    body = {"model": MODEL_NAME, "tokens": ids_of(sent)}
    whole = httpx.post(f"{bed.decode.url}/detokenize", json=body, timeout=60).raise_for_status().json()["prompt"]
    text = as_answer(api, sent).text
    assert len(whole) - len(text) >= len(stop) - 1


@APIS
def test_the_token_that_ends_an_answer_has_an_id_and_no_text(bed: Bed, api: Api) -> None:
    body = long_body(api, prompt_of(20, "end"), 60)
    undisturbed = streamed(bed.decode, api, body)
    ids = ids_of(undisturbed)
    last = next(position for position in range(20, 60) if ids[position] not in ids[:position])
    stream = streamed(bed.decode, api, {**body, "stop_token_ids": [ids[last]]})
    assert ids_of(stream) == ids[: last + 1]
    (choice,) = stream[-2]["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ids[last])
    assert as_answer(api, undisturbed).text.startswith(as_answer(api, stream).text)


def test_a_chats_prompt_may_be_sent_as_ids_on_both_legs_whatever_its_tools(bed: Bed) -> None:
    """The prompt has some of the answer behind it, as when a stream is resumed."""
    body = {**long_body(Api.CHAT, prompt_of(44, "both legs"), 40), "tools": TOOLS, "tool_choice": "none"}
    whole = streamed(bed.prefill, Api.CHAT, body)
    (prompt,), said = prompt_ids_of(Api.CHAT, whole), ids_of(whole)[:9]
    on_both = {"prompt_token_ids": prompt + said}
    prefill_leg = {**body, "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True, **on_both}}
    url = bed.prefill.url + Api.CHAT.value
    handoff = httpx.post(url, json=prefill_leg, timeout=60).raise_for_status().json()["kv_transfer_params"]
    assert handoff["remote_num_tokens"] == len(prompt) + len(said)
    pulled = bed.decode.metrics()[PULLED]
    rest = streamed(bed.decode, Api.CHAT, {**body, "max_tokens": 31, "kv_transfer_params": {**handoff, **on_both}})
    assert ids_of(rest) == ids_of(whole)[9:]
    wait_until(lambda: bed.decode.metrics()[PULLED] > pulled, 5, "decode to count the tokens pulled")


@APIS
def test_a_decode_leg_that_the_handler_refuses_releases_the_blocks_unread(bed: Bed, api: Api) -> None:
    """This is how the gateway releases an unneeded hand-off. A refusal by the body's schema would not release it."""
    body = body_for(api, prompt_of(160, "given back"), max_tokens=1)
    prefill_leg = {**body, "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}}
    prefilled = httpx.post(bed.prefill.url + api.value, json=prefill_leg, timeout=60).raise_for_status().json()
    decode_leg = {**body, "kv_transfer_params": prefilled["kv_transfer_params"]}
    received = bed.decode.metrics()[PULLED]

    schema = httpx.post(bed.decode.url + api.value, json={**decode_leg, "stop_token_ids": ["x"]}, timeout=60)
    assert schema.status_code == 400
    assert not bed.prefill.is_idle()
    handler = httpx.post(bed.decode.url + api.value, json={**decode_leg, "min_tokens": 2}, timeout=60)
    assert handler.status_code == 400
    # Any other request: without a progress thread (small_machine.py), decode sometimes notifies prefill with its next
    # step.
    ask(bed.decode.url, api, body_for(api, "Kana", max_tokens=1), stream=False)
    wait_until(bed.prefill.is_idle, 5, "prefill to free the blocks")
    assert bed.decode.metrics()[PULLED] == received


def test_engines_report_their_connector_before_any_request(bed: Bed) -> None:
    marks = {name: connector.traits.fingerprints for name, connector in CONNECTORS.items()}
    for engine in (bed.prefill, bed.decode):
        assert speaker(counted(httpx.get(f"{engine.url}/metrics", timeout=10).content), marks) == "nixl"


def test_engines_report_their_revision(bed: Bed) -> None:
    told = []
    for engine in (bed.prefill, bed.decode):
        (card,) = httpx.get(f"{engine.url}/v1/models", timeout=10).json()["data"]
        told.append((card["id"], card["root"], card["parent"], httpx.get(f"{engine.url}/version").json()["version"]))
    assert told[0] == told[1]
    name, root, parent, version = told[0]
    assert (name, parent) == (MODEL_NAME, None)
    assert root.endswith("tiny-model"), "where it was loaded from"
    assert version
