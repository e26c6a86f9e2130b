"""The encoder stage: images, audio and video are encoded by engines of their own, before prefill (vLLM's ECConnector).

An encoder gets the media parts of a chat and nothing else. It answers with what the engine that computes the prompt
needs to fetch them: `ec_transfer_params`, by the key under which each was stored. All legs name a part alike, by a
`uuid` that is made here: engines cache media under it, so one that a client chose could show it another client's, or
give others its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated

import msgspec

from pd_proxy.decoding import Undecodable, json_decoder
from pd_proxy.encoding import FALSE, encode_json
from pd_proxy.errors import BackendGarbled, InvalidRequest
from pd_proxy.handoff.connector import Name, Port
from pd_proxy.handoff.plan import Leg
from pd_proxy.requests.body import Body
from pd_proxy.requests.endpoints import LAYOUTS, Members
from pd_proxy.requests.json_scan import TooMany, elements
from pd_proxy.requests.json_scan import members as members_of

TOKENS = 1000
"""What a medium is taken to weigh on an encoder, as `body.py` counts it in a prompt."""

_KINDS = ("image_url", "audio_url", "input_audio", "video_url")
_ALONG = ("model", "mm_processor_kwargs", "media_io_kwargs", "priority", "session_id")
"""Members of the client's that shape what an encoder makes of its media, or when."""
_MOST = 2048
"""Messages and parts that are looked through, and more where they are long: one more for each of `_BYTES_EACH`."""
_BYTES_EACH = 4096
_USUAL_MEMBERS = 16  # of a message or a part; with more it counts for several

_decode_text = json_decoder(str)


class Medium(msgspec.Struct, frozen=True):
    """One image, recording or video of a request.

    Attributes:
        part: of the content, with its `uuid`.
        image: encoders take several of these at a time.
    """

    part: msgspec.Raw
    image: bool


class _Url(msgspec.Struct):
    url: str = ""


class _Handle(msgspec.Struct):
    """What an encoder says of one medium, as far as its types matter. Each connector has its own way to it."""

    metadata: dict[str, msgspec.Raw] = {}
    item_indices: list[Annotated[int, msgspec.Meta(ge=0)]] = []
    peer_host: Name | None = None
    peer_port: Port | None = None
    size_bytes: Annotated[int, msgspec.Meta(ge=0)] | None = None
    shape: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None


class _Encoded(msgspec.Struct):
    ec_transfer_params: dict[Name, msgspec.Raw] | None = None


_decode_url = json_decoder(str | _Url)
_decode_encoded = json_decoder(_Encoded)
_decode_handle = json_decoder(_Handle)
_RESERVED = ("ec_items", "consumer_zmq")  # by which encoders are told to push, in the place of a key


def read_media(body: Body, salt: str) -> tuple[Body, tuple[Medium, ...]]:
    """A chat with its media marked, and each of them once.

    Arguments:
        salt: unique to the request. A URL may give something else tomorrow, so what it gave is not found again by it.
    Raises:
        InvalidRequest: there is more in it than is looked through. As it is it may not be sent on.
    """
    raw = body.members.get("messages")
    said = b"" if raw is None else bytes(raw)
    most = _MOST + len(said) // _BYTES_EACH
    marks = _Marks(salt, most)
    try:
        messages = [marks.message(message) for message in elements(said)]
    except Undecodable:
        return body, ()  # the engine's to judge
    except TooMany:
        raise InvalidRequest(
            f"`messages` has more than {most} messages and parts, too many to look for media in", param="messages"
        ) from None
    if not marks.media:
        return body, ()
    members = {**body.members, "messages": msgspec.Raw(b"[%b]" % b",".join(messages))}
    return msgspec.structs.replace(body, members=members), tuple(marks.media.values())


class _Marks:
    """The media of one chat, found message by message.

    Attributes:
        media: by their keys.
    """

    def __init__(self, salt: str, most: int) -> None:
        self.media: dict[str, Medium] = {}
        self._salt = salt
        self._left = most

    def message(self, raw: memoryview) -> bytes | memoryview:
        """A message with its parts marked."""
        message = self._members(raw)
        content = message.get("content")
        if content is None or bytes(memoryview(content)[:1]) != b"[":
            return raw
        parts = b",".join([self._part(part) for part in elements(bytes(content))])
        message["content"] = msgspec.Raw(b"[%b]" % parts)
        return encode_json(message)

    def _part(self, raw: memoryview) -> bytes | memoryview:
        """A part of a content with the `uuid` that all legs give it; without any where it is no medium."""
        if bytes(raw[:1]) != b"{":
            self._spend(1)
            return raw
        part = self._members(raw)
        ours = part.pop("uuid", None) is None
        kind = part.get("type")
        name = "" if kind is None or bytes(memoryview(kind)[:1]) != b'"' else _decode_text(kind)
        if name not in _KINDS or name not in part:
            return raw if ours else encode_json(part)
        content = bytes(part[name])
        inline = name == "input_audio" or _url(content).startswith("data:")
        digest = hashlib.blake2b(
            name.encode() + b"\0" + (b"" if inline else self._salt.encode()) + b"\0", digest_size=32
        )
        digest.update(content)
        key = digest.hexdigest()
        marked = encode_json({**part, "uuid": key})
        self.media.setdefault(key, Medium(msgspec.Raw(marked), name == "image_url"))
        return marked

    def _members(self, raw: memoryview) -> Members:
        found = members_of(bytes(raw))
        self._spend(1 + len(found) // _USUAL_MEMBERS)
        return found

    def _spend(self, values: int) -> None:
        self._left -= values
        if self._left < 0:
            raise TooMany


def _url(content: bytes) -> str:
    """The URL of a medium's content; empty where it has none, which is the engine's to judge."""
    try:
        said = _decode_url(content)
    except Undecodable:
        return ""
    return said if isinstance(said, str) else said.url


def encode_leg(body: Body, media: Sequence[Medium]) -> Leg:
    """The leg that has some media encoded. An encoder never samples, so nothing bounds its answer."""
    messages = [{"role": "user", "content": [medium.part for medium in media]}]
    members = {name: body.members[name] for name in _ALONG if name in body.members}
    return Leg(LAYOUTS["chat"].path, (encode_json({**members, "messages": messages, "stream": FALSE}),))


def read_encoded(answer: bytes, count: int) -> dict[str, msgspec.Raw]:
    """What an encoder says of `count` media, by their keys and word for word. Empty where the way to them is a storage
    that both engines know.

    Raises:
        BackendGarbled: it is not what encoders say. Sent on, it could make the engine that reads it connect anywhere.
    """
    try:
        handles = _decode_encoded(answer).ec_transfer_params or {}
        for name, raw in handles.items():
            handle = _decode_handle(raw)
            if name in _RESERVED or any(index >= count for index in handle.item_indices):
                raise BackendGarbled("the encoder's ec_transfer_params name what it was not given")
            if (handle.peer_host is None) != (handle.peer_port is None):
                raise BackendGarbled("the encoder's ec_transfer_params name half of an address")
    except Undecodable as error:
        raise BackendGarbled(f"the encoder's ec_transfer_params are not usable: {error}") from None
    if len(handles) > count:
        raise BackendGarbled(f"the encoder's ec_transfer_params name {len(handles)} media and it was given {count}")
    return handles


def encoded(handles: dict[str, msgspec.Raw]) -> Members | None:
    """The members by which the engine that computes the prompt is told of all media."""
    return {"ec_transfer_params": msgspec.Raw(encode_json(handles))} if handles else None
