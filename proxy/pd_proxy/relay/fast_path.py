"""The fast path from the engine's socket to the client's: token events of a live stream, recognised by comparison.

The token events of one stream differ only in the text and the id of the token. From one that was parsed and found to be
an ordinary token event, `FastPath` learns what stands before the text and behind it. From then on a read that is one
whole chunk with such an event is passed on without being parsed, and of several events that come together the ordinary
ones at the front are taken as one piece. Everything else, and anything that differs in a single byte, takes the slow
path through the HTTP parser and the relay. So what passes here differs from a checked event only in the text of one
JSON string (which holds no quote) and in digits behind it, and can hide neither an error nor an address.

These lines run for each token: methods of bytes on the read itself, one system call, and no call of a Python function.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from itertools import pairwise, takewhile
from time import monotonic
from typing import Protocol

from pd_proxy.dialects.token_pattern import DIGITS, NOT_FINISHED, TokenPattern
from pd_proxy.relay.transcript import Transcript
from pd_proxy.telemetry.records import Distribution

_NO_HEAD = bytes(1 << 20)  # longer than any read, so that none begins with it


class _ChunkHeads(dict[int, bytes]):
    """Length of a whole chunk with its framing -> the size line that it must begin with, or `_NO_HEAD`.

    To compare the read with the one line that its length allows is cheaper than to parse it, and stricter: only the
    canonical form passes, lower-case hexadecimal without extensions.
    """

    def __missing__(self, length: int) -> bytes:
        head = _NO_HEAD
        for digits in range(1, 5):  # up to 65535 bytes; larger chunks may be parsed, and this table stays small
            size = length - digits - 4
            if size > 0 and len(b"%x" % size) == digits:
                head = b"%x\r\n" % size
        self[min(length, 65536)] = head
        return head


_CHUNK_HEADS = _ChunkHeads()
_NOT_TEXT = b'"\r\n'
_BRACKET = ord("]")
_BATCH = 32  # tokens whose times and ids are moved on together
_PACED = 8  # gaps from which a pace is reported: fewer are mostly those at the end of a stream


def _not_armed(data: bytes) -> None:
    raise AssertionError("the fast path has no client yet")


class PatternReader(Protocol):
    """Knows the form of a stream's events (`AnswerReader`)."""

    def pattern(self, sample: bytes) -> TokenPattern | None:
        """The pattern of the token events that are like a sample; None where they cannot be recognised by it."""


class FastPath(asyncio.Protocol):
    """The protocol of the engine's connection while its stream is live.

    Nothing passes before `arm`, nor after a read that was left to the connection until `allow` is called: only the
    parser knows whether that read ended where a chunk and an event end.

    Arguments:
        connection: gets every read that is not an ordinary token event, and all other calls of the transport.
        gaps: takes the seconds between tokens, some tokens at a time.
        transcript: takes the ids of tokens, if their events have ids that the client must not see.
        reader: finds the pattern of the stream's token events from a sample.
        pace: called now and then with the seconds that a token has taken lately; None if it is not needed.
    Attributes:
        armed: `arm` has been called.
    """

    __slots__ = (
        "_around",
        "_behind",
        "_clear",
        "_connection",
        "_counted",
        "_edited",
        "_form",
        "_gaps",
        "_head",
        "_id_at",
        "_ids",
        "_pace",
        "_prefix",
        "_prefix_length",
        "_reader",
        "_sample",
        "_shown",
        "_texts",
        "_times",
        "_together",
        "_transcript",
        "_write",
        "armed",
    )

    def __init__(
        self,
        connection: asyncio.Protocol,
        gaps: Distribution,
        transcript: Transcript,
        reader: PatternReader,
        pace: Callable[[float], object] | None = None,
    ) -> None:
        self._connection = connection
        self._gaps = gaps
        self._transcript = transcript
        self._reader = reader
        self._pace = pace
        self._clear = False  # the next read may pass
        self.armed = False
        self._write: Callable[[bytes], object] = _not_armed
        self._sample = b""  # an ordinary event as the engine sent it, of which the pattern has not been learnt
        # The pattern
        self._ids: list[bytes] | None = None
        self._texts: list[bytes] | None = None
        self._prefix = _NO_HEAD  # until an event has been learnt
        self._prefix_length = 0
        self._head = b""
        self._edited = False  # the head is not the prefix
        self._behind = b""
        self._id_at = 0
        self._shown = b""
        self._around = 0
        self._form: re.Pattern[bytes] | None = None
        # Times of reads
        self._times: list[float] = []
        self._counted = 0
        self._together = 0  # tokens that came with the one before them

    # What the relay uses

    def arm(self, write: Callable[[bytes], object]) -> None:
        """Set where reads go that pass.

        Arguments:
            write: sends whole chunks to the client.
        """
        self._write = write
        self.armed = True

    def allow(self) -> None:
        """Let the next read pass: the last one ended where a chunk and an event end."""
        self._clear = True

    def block(self) -> None:
        """Do not let the next read pass."""
        self._clear = False

    def forget_pace(self) -> None:
        """Stop reporting the pace, since it no longer shows the pace of the engine."""
        self._pace = None

    def learn(self, sample: bytes) -> None:
        """Take an ordinary token event as a sample. Its pattern is learnt when an event comes that may be like it.

        Arguments:
            sample: the event as the engine sent it.
        """
        self._sample = sample

    def data_received(self, data: bytes) -> None:
        # A chunk is `size CRLF event CRLF`; an event is `prefix text behind`, where `behind` equals that of the pattern
        # except for the digits. An event without text is not ordinary, since the transcript must note it.
        head = _CHUNK_HEADS[len(data)]
        start = len(head)
        text = start + self._prefix_length
        end = data.find(b'"', text)
        if (
            end > text
            and self._clear
            and data[:start] == head  # `startswith` costs twice as much
            and data[start:text] == self._prefix
            and (behind := data[end:]).translate(None, DIGITS) == self._behind
            and (self._ids is None or behind[self._id_at] != _BRACKET)
        ):
            ids = self._ids
            if ids is None:
                if self._edited:
                    data = data[text:]
                    data = b"%x\r\n%b%b" % (len(self._head) + len(data) - 2, self._head, data)
                self._write(data)
            else:
                # `behind` is `mid id ] tail`; the client gets `shown tail`.
                stop = behind.find(b"]")
                ids.append(behind[self._id_at : stop])
                said, tail = data[text:end], behind[stop + 1 :]
                if self._texts is not None:
                    self._texts.append(said)
                self._write(
                    # Joined in one step, so that a large event is copied once and not four times.
                    b"%x\r\n%b%b%b%b" % (self._around + len(said) + len(tail), self._head, said, self._shown, tail)
                )
            times = self._times
            times.append(monotonic())
            if len(times) > _BATCH:
                self.fold()
        elif self._sample and data.find(NOT_FINISHED) >= 0:
            self._learn()
            self.data_received(data)
        else:
            self._clear = False
            self._connection.data_received(data)

    def take(self, block: bytes) -> tuple[bytes, int, bytes]:
        """Split a block of events: the ordinary ones at its front, as the client sees them; their number; the rest.
        Their times are not noted here.

        Arguments:
            block: whole events, without the framing of chunks.
        """
        if self._sample and block.find(NOT_FINISHED) >= 0:
            self._learn()
        if self._form is None:
            return b"", 0, block
        # `prefix text`, id, tail, `prefix text`, id, tail, ..., what is behind the last of them
        parts = self._form.split(block)
        rest = parts.pop()
        prefix, length = self._prefix, self._prefix_length
        texts = [said[length:] for said in parts[::3] if said.startswith(prefix)]
        count = len(texts)
        every = b"".join(texts)
        if 3 * count < len(parts) or not all(texts) or every.translate(None, _NOT_TEXT) != every:
            heads = (said.startswith(prefix) and said[length:] for said in parts[::3])
            ordinary = takewhile(lambda text: text and text.translate(None, _NOT_TEXT) == text, heads)
            texts = list(ordinary)
            count = len(texts)
            rest = block.split(b"\n\n", count)[-1]
            del parts[3 * count :]
        if self._ids is not None:
            self._ids += parts[1::3]
            if self._texts is not None:
                self._texts += texts
        elif not self._edited:
            return block[: len(block) - len(rest)], count, rest
        parts[1::3] = [self._shown] * count
        if self._edited:
            parts[::3] = [self._head + text for text in texts]
        return b"".join(parts), count, rest

    def _learn(self) -> None:
        """Learn the pattern of the sample: from now on events that are like it pass."""
        sample, self._sample = self._sample, b""
        pattern = self._reader.pattern(sample)
        if pattern is None:
            return
        if pattern.with_ids:
            self._ids, self._texts = self._transcript.fresh, self._transcript.fresh_text
        self._prefix = pattern.prefix
        self._prefix_length = len(pattern.prefix)
        self._head = pattern.head
        self._edited = pattern.head != pattern.prefix
        self._behind = pattern.behind
        self._id_at = pattern.id_at
        self._shown = pattern.shown
        self._around = len(pattern.head) + len(pattern.shown) - 2  # the CRLF behind an event is in its tail
        self._form = pattern.form

    # The times of the tokens. The first in the list is the last of those that were moved on.

    def count(self, tokens: int, now: float) -> None:
        """Count tokens that came by the slow path in one read: there is no gap between them."""
        self._times.append(now)
        if tokens > 1:
            self._counted += tokens - 1
            self._together += tokens - 1
        if len(self._times) > _BATCH:
            self.fold()

    def given(self) -> tuple[int, float]:
        """The number of token events so far, and the time of the last one as `time.monotonic`; 0 before any."""
        times = self._times
        return self._counted + len(times), times[-1] if times else 0.0

    def fold(self) -> None:
        """Move gaps and ids on to where they are kept."""
        self.fold_times()
        self._transcript.fold()

    def fold_times(self) -> None:
        """Move the gaps on to where they are kept."""
        times = self._times
        if len(times) > 1:
            self._gaps.observe_all([after - before for before, after in pairwise(times)])
            gaps = len(times) - 1
            self._counted += gaps
            if self._pace is not None and gaps >= _PACED:
                self._pace((times[-1] - times[0]) / (gaps + self._together))
            del times[:-1]
        if self._together:
            self._gaps.observe_none(self._together)
            self._together = 0

    # The rest of the protocol is the connection's.

    def eof_received(self) -> bool | None:
        return self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)
