"""Transcriptions and translations: the request is a multipart form, the answer is a text, in one piece or as events.

Invariant: the text is a pure function of the file's bytes and the engine's weights.
"""

from __future__ import annotations

import asyncio
import json
import uuid
import zlib
from email.message import Message
from email.parser import BytesParser
from typing import Any

from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.errors import bad_request, internal_error, invalid_field
from pd_proxy_simulator.faults import InjectedFaults
from pd_proxy_simulator.http import Exchange
from pd_proxy_simulator.pooling import check_model
from pd_proxy_simulator.tokens import GENERATED, detokenize, mix

_WORDS = 12
_FORMATS = {"json", "text", "verbose_json"}  # vLLM's formats; OpenAI has srt and vtt too


def read_form(exchange: Exchange) -> dict[str, list[bytes]]:
    """The parts of a form by name."""
    kind = exchange.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise invalid_field("file", "missing", "Field required", None)
    message = BytesParser().parsebytes(b"content-type: " + kind.encode("latin-1") + b"\r\n\r\n" + exchange.body)
    parts = message.get_payload()
    if not isinstance(parts, list) or message.defects:
        raise bad_request("There was an error parsing the body")
    found: dict[str, list[bytes]] = {}
    for part in parts:
        assert isinstance(part, Message)
        content = part.get_payload(decode=True)
        found.setdefault(str(part.get_param("name", header="content-disposition")), []).append(
            content if isinstance(content, bytes) else b""
        )
    return found


def words(audio: bytes, config: SimulatorConfig) -> list[str]:
    """The words that are recognized in the file."""
    seed = mix(zlib.crc32(audio) + config.weights)
    picked = [GENERATED[mix(seed + place) % len(GENERATED)] for place in range(_WORDS)]
    return [detokenize([token]) for token in picked]


async def transcribe(
    exchange: Exchange, form: dict[str, list[bytes]], injected: InjectedFaults, sim: SimulatorConfig
) -> int:
    """Answer one request; returns the number of words in the answer."""
    fields = {name: values[-1].decode("utf-8", "replace") for name, values in form.items() if name != "file"}
    check_model(dict(fields), sim)
    if "file" not in form:
        raise invalid_field("file", "missing", "Field required", None)
    shape = fields.get("response_format") or "json"
    if shape not in _FORMATS:
        raise bad_request(f"response_format {shape!r} is not supported", "response_format")
    heard = words(form["file"][-1], sim)
    if fields.get("stream", "").lower() in ("true", "1"):
        return await _stream(exchange, heard, injected, sim)
    text = "".join(heard)
    if shape == "text":
        exchange.respond(200, text.encode(), "text/plain; charset=utf-8")
        return len(heard)
    answer: dict[str, Any] = {"text": text, "usage": {"type": "duration", "seconds": 1}}
    if shape == "verbose_json":
        answer |= {"language": fields.get("language") or "en", "duration": "1.0", "segments": [], "words": []}
    exchange.respond(200, json.dumps(answer).encode())
    return len(heard)


async def _stream(exchange: Exchange, heard: list[str], injected: InjectedFaults, sim: SimulatorConfig) -> int:
    identity = {"id": f"trsc-{uuid.uuid4().hex}", "object": "transcription.chunk", "created": 0, "model": sim.model}
    error = b"data: " + json.dumps(internal_error().body()).encode() + b"\n\n"
    exchange.start_stream()
    if injected.get("error_event_first") is not None:
        exchange.write(error + b"data: [DONE]\n\n")
        exchange.end_stream()
        return 0
    death = injected.get("die_mid_stream")
    said = 0
    for word in heard:
        if death is not None and said == death.after_tokens:
            if death.ending == "error":
                exchange.write(error + b"data: [DONE]\n\n")
                exchange.end_stream()
            else:
                exchange.cut(polite=death.ending == "close")
            return said
        if not exchange.open:
            return said
        last = said == len(heard) - 1
        choice = {"delta": {"content": word}, "finish_reason": "stop" if last else None, "stop_reason": None}
        exchange.write(b"data: " + json.dumps({**identity, "choices": [choice]}).encode() + b"\n\n")
        said += 1
        await asyncio.sleep(sim.step_time)
    exchange.write(b"data: [DONE]\n\n")
    exchange.end_stream()
    return said
