"""The requests of the tests, and how an answer is read so that two servers' answers can be compared."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

import httpx

from .engines import MODEL_NAME

WORDS = ("kana", "lored", "misting", "suste", "tella", "rasta", "nolla", "viste", "kasto", "milling", "suna", "token")
"""Words of the tiny model's corpus: after a space each is one token, and so is each with a capital at the start."""

PROMPT_TOKENS = (2, 3, 7, 16, 31, 32, 33, 47, 63, 64, 65, 95, 96, 97, 128, 129, 200, 256, 320, 401)
"""Twenty lengths, around the ends of 32-token KV blocks and between them."""

MAX_TOKENS = 40
"""Longer than a block, so that decode fills blocks of its own after those that it pulled."""


class Api(Enum):
    """An endpoint; the value is its path."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client reads from an answer, streamed or not."""

    text: str
    finish_reason: str | None
    usage: dict[str, Any]
    """Without the number that depends on an engine's cache (`prompt_tokens_details`)."""


class BrokenStreamError(Exception):
    """A stream held an error event or ended without `[DONE]`."""


def prompt_of(tokens: int, salt: str = "") -> str:
    """A prompt of exactly this many tokens. Another salt leads to other words, whose blocks no engine has in its
    cache."""
    rng = random.Random(f"{tokens} {salt}")
    return " ".join(rng.choices(WORDS, k=tokens)).capitalize()


def body_for(api: Api, prompt: str, **fields: Any) -> dict[str, Any]:
    """A greedy request for `prompt`; `fields` are added to its body."""
    asked = {"prompt": prompt} if api is Api.COMPLETIONS else {"messages": [{"role": "user", "content": prompt}]}
    return {"model": MODEL_NAME, "temperature": 0, "max_tokens": MAX_TOKENS, **asked, **fields}


def long_body(api: Api, prompt: str, length: int, **fields: Any) -> dict[str, Any]:
    """A greedy request whose answer has exactly `length` tokens, since the end-of-sequence token does not end it."""
    return body_for(api, prompt, **{"max_tokens": length, "ignore_eos": True, **fields})


@dataclass(frozen=True, slots=True)
class Question:
    """One greedy request; two servers that get the same one must answer the same."""

    api: Api
    stream: bool
    tokens: int
    salt: str = ""
    length: int = 0
    """Tokens of the answer, regardless of the end-of-sequence token; 0: up to `MAX_TOKENS`, with it."""

    def __str__(self) -> str:
        return f"{self.api.name.lower()}-{'streamed' if self.stream else 'whole'}-{self.tokens}"

    def body(self) -> dict[str, Any]:
        """The request without its `stream`. Some have a stop string, to get another finish reason than `length`."""
        if self.length:
            return long_body(self.api, prompt_of(self.tokens, self.salt), self.length)
        stop = {"stop": ["st"]} if self.tokens % 4 == 3 else {}
        return body_for(self.api, prompt_of(self.tokens, self.salt), **stop)

    def ask(self, url: str) -> tuple[Answer, httpx.Headers]:
        """The answer of the server at `url`, and its headers. Raises as the function `ask` does."""
        return ask(url, self.api, self.body(), stream=self.stream)


COMPARED_QUESTIONS = tuple(
    Question(api, stream, tokens) for api in Api for stream in (False, True) for tokens in PROMPT_TOKENS
)
UNSEEN_QUESTIONS = tuple(Question(api, stream, 180, f"unseen-{stream}") for api in Api for stream in (False, True))
"""Each with a prompt that no other request has, so that decode cannot have its KV cache from an earlier request."""

SEVERED_TOKENS = (20, 31, 46, 47, 57, 64, 90, 110, 130, 150)
"""Prompts that, alone or with the tokens before a cut, end at a block's edge in one API or the other, and some
between. (A chat's prompt has seventeen tokens more.)"""
SEVERED_QUESTIONS = tuple(Question(api, True, tokens, "severed", 40) for api in Api for tokens in SEVERED_TOKENS)
HUNG_QUESTIONS = tuple(Question(api, True, 80, f"hung-{api.name}", 1000) for api in Api)
KILLED_QUESTIONS = tuple(
    # streams of the first wave still run when the last one begins
    Question(api, stream, tokens, "killed", 800 if stream else 400)
    for stream, lengths in ((False, (70, 130)), (True, (40, 64, 90, 111, 150, 200)))
    for tokens in lengths
    for api in Api
)
STOPPED_QUESTIONS = tuple(
    Question(api, stream, tokens, "stopped", 1000) for tokens in (64, 111) for stream in (True, False) for api in Api
)
"""Long enough that all have begun on one engine before the first has ended."""
RELEASED_QUESTIONS = tuple(Question(api, False, 330, f"released-{api.name}", 40) for api in Api)
ROUTE_QUESTIONS = tuple(
    Question(Api.CHAT, False, tokens, f"{route}-{way}", MAX_TOKENS)
    for route, tokens in (("messages", 80), ("responses", 97), ("generate", 130))
    for way in ("whole", "streamed")
)
"""Requests on other endpoints; the same words in a chat make the same prompt."""

ALL_QUESTIONS = (
    COMPARED_QUESTIONS
    + UNSEEN_QUESTIONS
    + SEVERED_QUESTIONS
    + HUNG_QUESTIONS
    + KILLED_QUESTIONS
    + STOPPED_QUESTIONS
    + RELEASED_QUESTIONS
    + ROUTE_QUESTIONS
)


def ask(url: str, api: Api, body: dict[str, Any], *, stream: bool, timeout: float = 60) -> tuple[Answer, httpx.Headers]:
    """Send one request and read its whole answer.

    Raises:
        httpx.HTTPStatusError: the answer is no 200.
        BrokenStreamError: the stream failed after its 200.
    """
    if stream:
        return ask_streamed(url, api, body, timeout)
    response = httpx.post(url + api.value, json=body, timeout=timeout).raise_for_status()
    return as_whole_answer(api, response.json()), response.headers


def ask_streamed(url: str, api: Api, body: dict[str, Any], timeout: float) -> tuple[Answer, httpx.Headers]:
    with streaming(url, api, body, timeout) as response:
        return as_answer(api, events(response)), response.headers


@contextmanager
def streaming(url: str, api: Api, body: dict[str, Any], timeout: float = 60) -> Iterator[httpx.Response]:
    """A stream that has begun, with its usage requested. Raises httpx.HTTPStatusError where it has not begun."""
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", url + api.value, json=streamed, timeout=timeout) as response:
        response.raise_for_status()
        yield response


@contextmanager
def asked(url: str, api: Api, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request that has been sent, by a client that disconnects when the block ends, whatever it has received."""
    content = json.dumps(body).encode()
    address = urlsplit(url)
    head = f"POST {api.value} HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: application/json\r\n"
    head += f"connection: close\r\ncontent-length: {len(content)}\r\n\r\n"
    with socket.create_connection((address.hostname or "", address.port or 80), timeout=60) as connection:
        connection.sendall(head.encode() + content)
        yield connection


def as_whole_answer(api: Api, body: dict[str, Any]) -> Answer:
    """The answer in a body that was not streamed."""
    choice = body["choices"][0]
    text = choice["text"] if api is Api.COMPLETIONS else choice["message"]["content"]
    return Answer(text, choice["finish_reason"], without_cached(body["usage"]))


def as_answer(api: Api, stream: Iterable[dict[str, Any]]) -> Answer:
    """The answer that a client assembles from a stream's events."""
    text, finish_reason = "", None
    usage: dict[str, Any] = {}
    for event in stream:
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            text += (choice["text"] if api is Api.COMPLETIONS else choice["delta"].get("content")) or ""
            finish_reason = choice["finish_reason"] or finish_reason
    return Answer(text, finish_reason, without_cached(usage))


def without_cached(usage: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in usage.items() if name != "prompt_tokens_details"}


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON events of a stream, up to `[DONE]`."""
    return events_of(response.iter_lines())


def events_of(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The same for lines that have been read."""
    for line in lines:
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise BrokenStreamError(f"error event after status 200: {event['error']}")
            yield event
    raise BrokenStreamError("the stream ended without [DONE]")
