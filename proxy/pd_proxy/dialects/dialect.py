"""The seam between the gateway and the APIs of the engines.

A `Dialect` is one API's form of answers. Each has a file of its own and a line in `registry.py`; the relay and the legs
use only this module. For each streamed answer a dialect makes an `AnswerReader`, which turns the engine's events into
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
    """Keeps what the client has been sent (`relay/transcript.py`).

    Attributes:
        continuable: the answer can be continued, exactly or not.
        finished: the client has been sent the reason why the answer ended.
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
        """Returns the events that end an answer whose tokens were all sent."""


class TokenPath(Protocol):
    """The relay's fast path, which passes ordinary token events on without parsing them (`relay/fast_path.py`)."""

    def learn(self, sample: bytes) -> None:
        """Take an ordinary token event as a sample of those that follow."""

    def take(self, block: bytes) -> tuple[bytes, int, bytes]:
        """Split a block of events: the ordinary ones at its front, as the client sees them; their number; the rest."""


class AnswerReader(Protocol):
    """Reads the events of one streamed answer and turns them into the client's."""

    @property
    def usage(self) -> Usage | None:
        """The last usage that the engine reported, of this leg alone."""

    @property
    def failure(self) -> BackendError | None:
        """The error that an event stands for; no event behind it is read. It is raised once those before it are
        sent."""

    @property
    def done(self) -> bool:
        """Whether the event that ends the answer has been read."""

    @property
    def has_content(self) -> bool:
        """Whether there has been anything for the client to read. Until then the request can be tried elsewhere."""

    @property
    def sequence(self) -> int:
        """The number of the last event, where events are numbered; else -1."""

    @property
    def kept(self) -> int:
        """Bytes that the reader keeps until there is something to read."""

    @property
    def pending(self) -> bytes:
        """Events that were read and will be sent together with the next one."""

    @property
    def fast_path(self) -> bool:
        """Whether ordinary token events need not be parsed."""

    @property
    def end_name(self) -> str:
        """The name of the event that ends a stream, for the message when it is missing."""

    @property
    def awaited(self) -> asyncio.Future[None] | None:
        """Done when events can be read; None where they always can."""

    def read(self, block: bytes, last: bool, fast_path: TokenPath) -> tuple[bytes, int]:
        """Read whole events.

        Arguments:
            last: they are the last ones of the answer.
        Returns:
            The events as the client sees them, and the number of token events among them.
        """

    def check(self, block: bytes) -> None:
        """Set `failure` if one of these events stands for an error. They are read later."""

    def go_live(self) -> None:
        """Called when the client is about to be sent what has been read."""

    def rewind(self) -> None:
        """Called when the client will not be sent anything of what has been read."""

    def ending(self) -> bytes:
        """The event that ends the answer, as the client sees it."""

    def pattern(self, sample: bytes) -> TokenPattern | None:
        """The pattern of the token events that are like a sample; None where they cannot be recognised by it."""


class Dialect(Protocol):
    """One API's form of answers."""

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
            edit: the changes to this leg's events.
            transcript: keeps what the client has been sent.
            drop_usage: take out the closing usage event, which the gateway asked for and the client did not.
            prompts: the number of prompts in a batch; 0 for a single one.
            logprobs: of the prompts, to be put into the events.
        """

    def whole(self, url: str, answer: bytes) -> WholeAnswer:
        """Read an answer in one piece that came with status 200.

        Raises:
            BackendError: it is an error, or the engine aborted the request, or it is not an answer.
        """

    def abort_reason(self, answer: bytes) -> object:
        """The reason in an answer with status 200 by which the engine aborted the request; None where it did not, and
        for an error or an answer that cannot be read."""
