"""The bodies for encoders, which of their answers are accepted, and the names of media."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pd_proxy.errors import BackendGarbled
from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy.handoff.encoder import Medium, encode_leg, encoded, read_encoded, read_media
from pd_proxy.handoff.plan import Plan
from pd_proxy.requests.body import Body, read_body

from tests.handoff.helpers import PNG, body_of, image, sound

HANDLE = {"metadata": {"grid": [1, 2]}, "item_indices": [0], "peer_host": "e", "peer_port": 5601, "size_bytes": 8}


def chat(*content: Any, **more: Any) -> Body:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": list(content), "name": "é"}]
    return read_body(json.dumps({"model": "m", "messages": messages, "max_tokens": 9, **more}).encode(), "chat")


def parts(body: Body) -> list[Any]:
    found: list[Any] = json.loads(bytes(body.members["messages"]))[-1]["content"]
    return found


def uuids(body: Body) -> list[str | None]:
    return [part.get("uuid") for part in parts(body)]


def test_all_media_are_found_in_their_order_and_nothing_else_changes() -> None:
    text = {"type": "text", "text": "what is that?", "odd": 1.50}
    video = {"type": "video_url", "video_url": {"url": "https://x/v"}}
    audio = {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,AA"}}
    body, media = read_media(chat(text, image(), sound(), video, audio, "bare"), "s")
    assert [json.loads(bytes(medium.part))["type"] for medium in media] == [
        "image_url",
        "input_audio",
        "video_url",
        "audio_url",
    ]
    assert [medium.image for medium in media] == [True, False, False, False]
    without = [{n: v for n, v in p.items() if n != "uuid"} if isinstance(p, dict) else p for p in parts(body)]
    assert without == [text, image(), sound(), video, audio, "bare"]
    assert json.loads(bytes(body.members["messages"]))[0] == {"role": "system", "content": "be brief"}


def test_a_mediums_name_depends_on_its_content_alone() -> None:
    first, _ = read_media(chat(image()), "one")
    second, _ = read_media(chat({"type": "text", "text": "."}, image()), "two")
    assert uuids(first)[0] == uuids(second)[1]
    assert len(str(uuids(first)[0])) == 64
    assert len({uuids(read_media(chat(part), "one")[0])[0] for part in (image(), image(PNG + "AA"), sound())}) == 3


def test_a_medium_behind_a_url_has_another_name_in_each_request() -> None:
    remote = image("https://example.com/cat.png")
    first, again, other = (read_media(chat(remote, remote), salt)[0] for salt in ("one", "one", "two"))
    assert uuids(first) == uuids(again)
    assert set(uuids(first)).isdisjoint(uuids(other))


def test_names_that_clients_chose_are_removed() -> None:
    chosen = [image(uuid="mine"), {"type": "text", "text": "a", "uuid": "mine"}, {"type": "image_url", "uuid": "mine"}]
    body, media = read_media(chat(*chosen, sound(uuid="mine")), "s")
    assert "mine" not in bytes(body.members["messages"]).decode()
    assert len(media) == 2


def test_the_same_medium_is_encoded_once() -> None:
    body, media = read_media(chat(image(), image(), sound()), "s")
    assert len(media) == 2
    assert uuids(body)[0] == uuids(body)[1]


@pytest.mark.parametrize(
    "messages",
    ["text", [], [1], [{"content": "text"}], [{"content": None}], [{"content": [{"type": 5}, 7, None]}], None],
)
def test_parts_without_media_are_left_to_the_engine(messages: Any) -> None:
    body = read_body(json.dumps({"messages": messages}).encode(), "chat")
    assert read_media(body, "s") == (body, ())


@pytest.mark.parametrize("content", [None, 5, [], {"url": 5}, {}])
def test_a_medium_with_invalid_content_is_still_a_medium(content: Any) -> None:
    _, media = read_media(chat({"type": "image_url", "image_url": content}), "s")
    assert len(media) == 1


def test_an_encoder_receives_only_the_media_and_their_processing_options() -> None:
    kwargs = {"mm_processor_kwargs": {"size": 1}, "media_io_kwargs": {"video": {}}, "tools": [], "temperature": 0}
    body, media = read_media(chat({"type": "text", "text": "secret"}, image(), stream=True, **kwargs), "s")
    leg = encode_leg(body, media)
    assert leg.path == "/v1/chat/completions"
    assert body_of(leg) == {
        "model": "m",
        "mm_processor_kwargs": {"size": 1},
        "media_io_kwargs": {"video": {}},
        "messages": [{"role": "user", "content": [parts(body)[1]]}],
        "stream": False,
    }


def answer(params: Any) -> bytes:
    return json.dumps({"choices": [], "ec_transfer_params": params}).encode()


def test_encoders_parameters_are_passed_on_unchanged() -> None:
    members = encoded(read_encoded(answer({"k": {**HANDLE, "shape": [2, 4], "more": 1}}), 1))
    assert members is not None
    assert json.loads(bytes(members["ec_transfer_params"])) == {"k": {**HANDLE, "shape": [2, 4], "more": 1}}
    assert encoded(read_encoded(answer(None), 1)) is None
    assert encoded(read_encoded(answer({}), 1)) is None
    assert encoded(read_encoded(b'{"choices": []}', 1)) is None


@pytest.mark.parametrize(
    "params",
    [
        [],
        "k",
        {"k": None},
        {"k": []},
        {"": HANDLE},
        {"k": HANDLE, "other": HANDLE},
        {"ec_items": HANDLE},
        {"consumer_zmq": HANDLE},
        {"k": {**HANDLE, "peer_port": "5601"}},
        {"k": {**HANDLE, "peer_port": 0}},
        {"k": {**HANDLE, "peer_host": 1}},
        {"k": {**HANDLE, "size_bytes": -1}},
        {"k": {**HANDLE, "shape": "large"}},
        {"k": {**HANDLE, "item_indices": [1]}},
        {"k": {**HANDLE, "metadata": []}},
        {"k": {"peer_host": "e"}},
        {"k": {"peer_port": 5601}},
    ],
    ids=str,
)
def test_invalid_encoder_parameters_are_refused(params: Any) -> None:
    with pytest.raises(BackendGarbled):
        read_encoded(answer(params), 1)


@pytest.mark.parametrize("whole", [b"", b"[]", b"{", b"\xff"])
def test_an_invalid_answer_is_refused(whole: bytes) -> None:
    with pytest.raises(BackendGarbled):
        read_encoded(whole, 1)


def test_the_engine_that_computes_the_prompt_receives_the_address_of_the_embeddings() -> None:
    body, media = read_media(chat(image()), "s")
    assert isinstance(media[0], Medium)
    plan = Plan(body, CONNECTORS["nixl"])
    plan.encoded = encoded({"k": read_encoded(answer({"k": HANDLE}), 1)["k"]})
    params = {"do_remote_prefill": True, "remote_block_ids": [[1]], "remote_engine_id": "e", "remote_host": "h"}
    given = {**params, "remote_request_id": "r", "remote_port": 1, "tp_size": 1}
    handoff, _ = plan.take(json.dumps({"choices": [], "kv_transfer_params": given}).encode())
    prefill, decode, alone = (body_of(x) for x in (plan.prefill_leg(), plan.decode_leg(handoff), plan.decode_leg(None)))
    assert prefill["ec_transfer_params"] == alone["ec_transfer_params"] == {"k": HANDLE}
    assert "ec_transfer_params" not in decode
    assert prefill["messages"] == decode["messages"] == alone["messages"]
