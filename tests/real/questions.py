"""What the tests ask, and how an answer is read so that two servers' answers can be compared."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import httpx

from .engines import MODEL_NAME

WORDS = ("kana", "lored", "misting", "suste", "tella", "rasta", "nolla", "viste", "kasto", "milling", "suna", "token")
"""Words of the tiny model's corpus: after a space each is one token, and so is each with a capital at the start."""

PROMPT_TOKENS = (2, 3, 7, 16, 31, 32, 33, 47, 63, 64, 65, 95, 96, 97, 128, 129, 200, 256, 320, 401)
"""Twenty lengths, around the ends of 32-token KV blocks and between them."""

MAX_TOKENS = 40
"""Longer than a block, so that decode fills blocks of its own after those it pulled."""


class Api(Enum):
    """An endpoint; the value is its path."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client makes of an answer, streamed or not."""

    text: str
    finish_reason: str | None
    usage: dict[str, Any]


class BrokenStreamError(Exception):
    """A stream held an error event or ended without `[DONE]`."""


def prompt_of(tokens: int, salt: str = "") -> str:
    """A prompt of exactly that many tokens. Another salt gives other words: no engine has their blocks in its cache."""
    rng = random.Random(f"{tokens} {salt}")
    return " ".join(rng.choices(WORDS, k=tokens)).capitalize()


def body_for(api: Api, prompt: str, **fields: Any) -> dict[str, Any]:
    """A greedy request for `prompt`; `fields` are added to its body."""
    asked = {"prompt": prompt} if api is Api.COMPLETIONS else {"messages": [{"role": "user", "content": prompt}]}
    return {"model": MODEL_NAME, "temperature": 0, "max_tokens": MAX_TOKENS, **asked, **fields}


@dataclass(frozen=True, slots=True)
class Question:
    """One greedy request; two servers that are asked the same one must answer the same."""

    api: Api
    stream: bool
    tokens: int
    salt: str = ""

    def __str__(self) -> str:
        return f"{self.api.name.lower()}-{'streamed' if self.stream else 'whole'}-{self.tokens}"

    def body(self) -> dict[str, Any]:
        """The request without its `stream`. Some ask for a stop string, to see another finish reason than `length`."""
        stop = {"stop": ["st"]} if self.tokens % 4 == 3 else {}
        return body_for(self.api, prompt_of(self.tokens, self.salt), **stop)

    def ask(self, url: str) -> tuple[Answer, httpx.Headers]:
        """The answer of the server at `url`, and its headers. Raises as `ask` does."""
        return ask(url, self.api, self.body(), stream=self.stream)


COMPARED_QUESTIONS = tuple(
    Question(api, stream, tokens) for api in Api for stream in (False, True) for tokens in PROMPT_TOKENS
)
UNSEEN_QUESTIONS = tuple(Question(api, stream, 180, f"unseen-{stream}") for api in Api for stream in (False, True))
"""Each with a prompt that nothing else asks for, so that decode cannot have its KV cache from an earlier request."""

ALL_QUESTIONS = COMPARED_QUESTIONS + UNSEEN_QUESTIONS


def ask(url: str, api: Api, body: dict[str, Any], *, stream: bool, timeout: float = 60) -> tuple[Answer, httpx.Headers]:
    """Send one request and read its whole answer.

    Raises:
        httpx.HTTPStatusError: the answer is no 200.
        BrokenStreamError: the stream failed after its 200.
    """
    if stream:
        return ask_streamed(url, api, body, timeout)
    response = httpx.post(url + api.value, json=body, timeout=timeout).raise_for_status()
    whole = response.json()
    choice = whole["choices"][0]
    text = choice["text"] if api is Api.COMPLETIONS else choice["message"]["content"]
    return Answer(text, choice["finish_reason"], whole["usage"]), response.headers


def ask_streamed(url: str, api: Api, body: dict[str, Any], timeout: float) -> tuple[Answer, httpx.Headers]:
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    text, finish_reason = "", None
    usage: dict[str, Any] = {}
    with httpx.stream("POST", url + api.value, json=streamed, timeout=timeout) as response:
        response.raise_for_status()
        for event in events(response):
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                text += (choice["text"] if api is Api.COMPLETIONS else choice["delta"].get("content")) or ""
                finish_reason = choice["finish_reason"] or finish_reason
    return Answer(text, finish_reason, usage), response.headers


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON events of a stream, up to `[DONE]`."""
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise BrokenStreamError(f"error event after status 200: {event['error']}")
            yield event
    raise BrokenStreamError("the stream ended without [DONE]")
