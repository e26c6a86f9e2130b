"""The encoder stage: separate engines encode images, audio and video before prefill (vLLM's ECConnector).

An encoder gets only the media parts of a chat. It answers with `ec_transfer_params`, which contain for each key under
which it has stored a medium what the engine that computes the prompt needs to fetch it. In all legs a part has the same
`uuid`, which is made here. Engines cache media under it. With a `uuid` of its own choice a client could get another
client's media, or make others get its own.
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
"""The tokens that a medium counts on an encoder, as in `requests/body.py`."""

_KINDS = ("image_url", "audio_url", "input_audio", "video_url")
_ALONG = ("model", "mm_processor_kwargs", "media_io_kwargs", "priority", "session_id")
"""Members of the client's request that change how or when an encoder encodes its media."""
_MOST = 2048
"""The most messages and parts of a chat; one more is allowed for each `_BYTES_EACH` bytes."""
_BYTES_EACH = 4096
_USUAL_MEMBERS = 16  # members of a message or a part; one with more counts as several

_decode_text = json_decoder(str)


class Medium(msgspec.Struct, frozen=True):
    """One image, recording or video of a request.

    Attributes:
        part: the part of the message's content, with its `uuid`.
        image: whether it is an image, of which an encoder takes several in one request.
    """

    part: msgspec.Raw
    image: bool


class _Url(msgspec.Struct):
    url: str = ""


class _Handle(msgspec.Struct):
    """What an encoder answers for one medium: the members whose types are checked. Each connector uses some of them."""

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
_RESERVED = ("ec_items", "consumer_zmq")  # not keys: these make an encoder push


def read_media(body: Body, salt: str) -> tuple[Body, tuple[Medium, ...]]:
    """Find the media of a chat. Returns the body with a `uuid` in each, and each different medium once.

    Arguments:
        salt: unique to the request. It is part of the key of a medium that is given by URL, since the URL may lead to
            other content later.
    Raises:
        InvalidRequest: the chat has too many messages and parts. It is refused, since unread parts could have a `uuid`
            of the client.
    """
    raw = body.members.get("messages")
    said = b"" if raw is None else bytes(raw)
    most = _MOST + len(said) // _BYTES_EACH
    keyed = _KeyedMedia(salt, most)
    try:
        messages = [keyed.message(message) for message in elements(said)]
    except Undecodable:
        return body, ()  # malformed, which the engine reports
    except TooMany:
        raise InvalidRequest(
            f"`messages` has more than {most} messages and parts, too many to look for media in", param="messages"
        ) from None
    if not keyed.media:
        return body, ()
    members = {**body.members, "messages": msgspec.Raw(b"[%b]" % b",".join(messages))}
    return msgspec.structs.replace(body, members=members), tuple(keyed.media.values())


class _KeyedMedia:
    """Adds their keys to the media of one chat, message by message.

    Attributes:
        media: the media by their keys.
    """

    def __init__(self, salt: str, most: int) -> None:
        self.media: dict[str, Medium] = {}
        self._salt = salt
        self._left = most

    def message(self, raw: memoryview) -> bytes | memoryview:
        """A message with a `uuid` in each of its media."""
        message = self._members(raw)
        content = message.get("content")
        if content is None or bytes(memoryview(content)[:1]) != b"[":
            return raw
        parts = b",".join([self._part(part) for part in elements(bytes(content))])
        message["content"] = msgspec.Raw(b"[%b]" % parts)
        return encode_json(message)

    def _part(self, raw: memoryview) -> bytes | memoryview:
        """A part of a content with the `uuid` that it has in all legs; without one where it is not a medium."""
        if bytes(raw[:1]) != b"{":
            self._spend(1)
            return raw
        part = self._members(raw)
        unchanged = part.pop("uuid", None) is None
        kind = part.get("type")
        name = "" if kind is None or bytes(memoryview(kind)[:1]) != b'"' else _decode_text(kind)
        if name not in _KINDS or name not in part:
            return raw if unchanged else encode_json(part)
        content = bytes(part[name])
        inline = name == "input_audio" or _url(content).startswith("data:")
        digest = hashlib.blake2b(
            name.encode() + b"\0" + (b"" if inline else self._salt.encode()) + b"\0", digest_size=32
        )
        digest.update(content)
        key = digest.hexdigest()
        with_key = encode_json({**part, "uuid": key})
        self.media.setdefault(key, Medium(msgspec.Raw(with_key), name == "image_url"))
        return with_key

    def _members(self, raw: memoryview) -> Members:
        found = members_of(bytes(raw))
        self._spend(1 + len(found) // _USUAL_MEMBERS)
        return found

    def _spend(self, values: int) -> None:
        self._left -= values
        if self._left < 0:
            raise TooMany


def _url(content: bytes) -> str:
    """The URL of a medium; empty where it has none, which the engine reports."""
    try:
        said = _decode_url(content)
    except Undecodable:
        return ""
    return said if isinstance(said, str) else said.url


def encode_leg(body: Body, media: Sequence[Medium]) -> Leg:
    """The leg that has some media encoded. An encoder does not sample, so the leg has no bound of tokens."""
    messages = [{"role": "user", "content": [medium.part for medium in media]}]
    members = {name: body.members[name] for name in _ALONG if name in body.members}
    return Leg(LAYOUTS["chat"].path, (encode_json({**members, "messages": messages, "stream": FALSE}),))


def read_encoded(answer: bytes, count: int) -> dict[str, msgspec.Raw]:
    """What an encoder's answer says of `count` media, by their keys and unchanged. Empty where the engines share a
    storage.

    Raises:
        BackendGarbled: it is not an encoder's answer. Passed on, it could make an engine connect to any address.
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
    """The members with which the leg that computes the prompt names all media; None where there are none."""
    return {"ec_transfer_params": msgspec.Raw(encode_json(handles))} if handles else None
