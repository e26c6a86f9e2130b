"""Images, audio and video between engines: an encoder stores their embeddings, and other engines fetch these
(ECConnector).

`example` stores a file in a folder that all engines share; `cpu` keeps the embedding and answers with the address where
it can be fetched. Invariant: a fetched embedding stands in the prompt as it came, so that an embedding of another
medium under the same key leads to another text.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pd_proxy.decoding import decode_python_json

from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.errors import bad_request, internal_error
from pd_proxy_simulator.fields import Object
from pd_proxy_simulator.prompts import EMBEDDING, embedding
from pd_proxy_simulator.sidechannel import Peers

KINDS = ("image_url", "audio_url", "input_audio", "video_url")
REFERENCES = ("image_embeds", "audio_embeds", "video_embeds")
"""Types of parts that hold only the name of a stored embedding."""


class MediaEngine(Protocol):
    """The engine that encodes and fetches media.

    Attributes:
        side_port: the port where the embeddings that the engine keeps can be fetched.
        peers: the side channels of other engines.
    """

    config: SimulatorConfig
    side_port: int
    peers: Peers

    def die(self, reason: str) -> None:
        """Die as after a failed assertion in the core."""


class Media:
    """The media of one engine.

    `encoded`: media that it has encoded itself. `fetched_from_others`: media that another engine had encoded. `missed`:
    fetches that found nothing.
    """

    def __init__(self, engine: MediaEngine) -> None:
        self._engine = engine
        self._kept: dict[str, list[int]] = {}
        self.encoded = 0
        self.fetched_from_others = 0
        self.missed = 0

    async def encode(self, body: Object) -> Object | None:
        """Do an encoder's work; returns the `ec_transfer_params` of its answer. Raises RequestError."""
        config = self._engine.config
        found: dict[str, Object] = {}
        for index, part in enumerate(_parts(body)):
            if part["type"] in REFERENCES:
                raise internal_error()
            if part.get(part["type"]) is None:
                raise bad_request(f"a part of type {part['type']} without {part['type']}", "messages")
            key = _key(part, body)
            if config.encode_time:
                await asyncio.sleep(config.encode_time)
            self.encoded += 1
            made = embedding(part)
            handle = found.setdefault(key, {"metadata": {"grid": [1, 4, 4]}, "item_indices": []})
            handle["item_indices"].append(index)
            if config.encoder_connector == "example":
                _store(config.encoder_storage, key, made)
                continue
            self._kept[key] = made
            size = {"size_bytes": 2 * len(made), "shape": [len(made), 1]}
            handle |= {"peer_host": config.advertised_host, "peer_port": self._engine.side_port, **size}
        return found or None

    def on_message(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """The reply to a message at the side port, if the message is about media."""
        if message["op"] != "embedding":
            return None
        return {"found": self._kept.get(message["key"])}

    async def fetched(self, body: Object) -> Object:
        """A request's body with the embeddings of its media in the prompt. Embeddings that no encoder has are made
        here."""
        parts = _parts(body)
        if not parts:
            return body
        params = body.get("ec_transfer_params") or {}
        if not isinstance(params, dict):
            return body  # refused later, in pydantic's words
        found: dict[int, list[int]] = {}
        for part in parts:
            made = await self._fetch(_key(part, body), params)
            if made is None:
                if part["type"] in REFERENCES:
                    raise internal_error()  # there is no medium to encode in place of the missing embedding
                if self._engine.config.encode_time:
                    await asyncio.sleep(self._engine.config.encode_time)
                self.encoded += 1
            else:
                self.fetched_from_others += 1
                found[id(part)] = made
        messages = [
            {**message, "content": [_with(part, found) for part in message["content"]]}
            if isinstance(message, dict) and isinstance(message.get("content"), list)
            else message
            for message in body["messages"]
        ]
        return {**body, "messages": messages}

    async def _fetch(self, key: str, params: Object) -> list[int] | None:
        config = self._engine.config
        made: list[int] | None = None
        if config.encoder_connector == "example":
            made = _stored(config.encoder_storage, key)
        elif config.encoder_connector == "cpu" and key in params:
            handle = params[key]
            try:
                if type(handle["peer_port"]) is not int or type(handle["size_bytes"]) is not int:
                    raise TypeError(f"the handle of {key}")
                where = str(handle["peer_host"]), handle["peer_port"]
            except (KeyError, TypeError) as error:
                self._engine.die(f"{type(error).__name__}: {error}")
                return None
            made = await self._engine.peers.embedding(*where, key)
        self.missed += made is None and config.encoder_connector != "none"
        return made


def _store(folder: str, key: str, made: list[int]) -> None:
    Path(folder, key).write_text(json.dumps(made), encoding="ascii")


def _stored(folder: str, key: str) -> list[int] | None:
    file = Path(folder, key)
    found: list[int] | None = decode_python_json(file.read_text(encoding="ascii")) if file.exists() else None
    return found


def _parts(body: Object) -> list[Object]:
    """The media of a chat, in order."""
    messages = body.get("messages")
    contents = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return [part for part in parts if part.get("type") in (*KINDS, *REFERENCES)]


def _key(part: Object, body: Object) -> str:
    """The key under which a medium is cached: its uuid or its content, and how it is processed."""
    name = part.get("uuid")
    if not isinstance(name, str):
        name = hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()
    processing = body.get("mm_processor_kwargs")
    if processing:
        name = hashlib.sha256(f"{name}{json.dumps(processing, sort_keys=True)}".encode()).hexdigest()
    return name


def _with(part: Any, found: Mapping[int, list[int]]) -> Any:
    return {**part, EMBEDDING: found[id(part)]} if id(part) in found else part
