"""The seam between the gateway and the APIs of the engines.

A `Dialect` is one API's way to write answers. It has a file of its own and a line in `registry.py`; the relay and the
legs know this module alone. For each streamed answer it makes an `AnswerReader`, which turns the engine's events into
the client's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol

from pd_proxy.dialects.edit import Edit
from pd_proxy.dialects.prompt_logprobs import PromptLogprobs
from pd_proxy.dialects.token_pattern import TokenPattern
from pd_proxy.dialects.usage import Usage
from pd_proxy.dialects.whole import WholeAnswer
from pd_proxy.errors import BackendError


class TokenLog(Protocol):
    """Where a reader writes down what of an answer the client is given (`relay/transcript.py`).

    Attributes:
        continuable: there is something to go on from, exactly or not.
        finished: the client is given a reason why the answer ended.
        first: the first event as the client saw it.
    """

    continuable: bool
    finished: bool
    first: bytes

    def mark(self) -> None:
        """Remember the state before a leg, for `rewind`."""

    def rewind(self) -> None:
        """Return to the state at `mark`."""

    def open(self, first: bytes, prompt: bytes) -> None:
        """Begin with the first event and the ids of the prompt."""

    def note(self, ids: bytes, text: str | bool) -> None:
        """Write down an event that is passed on: its ids, and its text or whether it has anything else to read."""

    def close(self, indexes: Iterable[object]) -> None:
        """Note that the client is sent a `finish_reason` for these choices."""

    def mark_inexact(self, reason: str) -> None:
        """Note that the answer cannot be continued exactly."""

    def closing(self, *, finish: str = "", usage: bool) -> bytes:
        """The events that end an answer of which all tokens were sent."""


class TokenPath(Protocol):
    """What takes ordinary token events without reading them (`relay/fast_path.py`)."""

    def learn(self, sample: bytes) -> None:
        """An ordinary token event has been read; those that follow may be like it."""

    def take(self, block: bytes) -> tuple[bytes, int, bytes]:
        """Of events that came together, those at the front that are ordinary, as the client sees them; their number;
        and the rest of the block."""


class AnswerReader(Protocol):
    """One streamed answer: reads its engine's events and makes them the client's."""

    @property
    def usage(self) -> Usage | None:
        """The last usage that the engine reported, of this leg alone."""

    @property
    def failure(self) -> BackendError | None:
        """The error that an event stood for; no event behind it is read. It is raised once those before it are out."""

    @property
    def done(self) -> bool:
        """The event that ends the answer has been read."""

    @property
    def has_content(self) -> bool:
        """The client has something to read. What came before it may be taken back and begun anew elsewhere."""

    @property
    def sequence(self) -> int:
        """The number of the last event, where events are numbered; else -1."""

    @property
    def kept(self) -> int:
        """Bytes that are kept until there is something to read."""

    @property
    def pending(self) -> bytes:
        """Events that were read and go out together with the next one."""

    @property
    def fast_path(self) -> bool:
        """Whether ordinary token events need not be read."""

    @property
    def end_name(self) -> str:
        """What a stream lacks that ends too early, for messages."""

    @property
    def awaited(self) -> asyncio.Future[None] | None:
        """Done when events can be read; None where they always can."""

    def read(self, block: bytes, last: bool, fast_path: TokenPath) -> tuple[bytes, int]:
        """Read whole events.

        Arguments:
            last: nothing follows them.
        Returns:
            them as the client sees them, and the number of token events among them.
        """

    def check(self, block: bytes) -> None:
        """Set `failure` if one of these events stands for one; they are read later."""

    def go_live(self) -> None:
        """The client is about to be given what has been read."""

    def rewind(self) -> None:
        """The client is not going to be given anything of what has been read."""

    def ending(self) -> bytes:
        """The event that ends the answer, as the client sees it."""

    def pattern(self, sample: bytes) -> TokenPattern | None:
        """What an ordinary token event shows of those that are like it; None where it shows nothing."""


class Dialect(Protocol):
    """One API's way to write answers."""

    def reader(
        self,
        url: str,
        edit: Edit,
        transcript: TokenLog,
        *,
        drop_usage: bool,
        prompts: int = 0,
        logprobs: PromptLogprobs | None = None,
    ) -> AnswerReader:
        """A reader for one streamed answer.

        Arguments:
            url: the backend, for messages.
            edit: how this leg's events become the client's.
            transcript: where it is written down what the client was given.
            drop_usage: take out the closing usage event, which the gateway asked for and the client did not.
            prompts: how many the request has, where they are a batch; else 0.
            logprobs: of the prompts, to be put into the events.
        """

    def whole(self, url: str, answer: bytes) -> WholeAnswer:
        """Read an answer in one piece that came with status 200.

        Raises:
            BackendError: it is an error, or the engine gave the request up, or it is not an answer.
        """

    def abort_reason(self, answer: bytes) -> object:
        """By which word an engine gave a request up that it answered with status 200, or None where it did not. An
        answer that cannot be read, or is an error, is for others to judge."""
