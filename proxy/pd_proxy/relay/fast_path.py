"""The fast path from the engine's socket to the client's: a live stream's token events, recognised by comparison.

One stream's token events are alike but for the text and the id of the token. From one that was read and found to be an
ordinary token event, `FastPath` learns what stands before the text and behind it; from then on a read that is one whole
chunk with such an event is passed on without being parsed, and of several events that come together those at the front
are taken as one piece. Everything else, and whatever differs in a single byte, takes the slow path through the HTTP
parser and the relay. So what passes here differs from a vetted event in the text of one JSON string (which holds no
quote) and in digits behind it, and can hide neither an error nor an address.

These are the gateway's hottest lines: bytes methods on the read itself, one system call, and no call of our own.
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
    """Length of a whole chunk with its framing -> the size line it must begin with, or `_NO_HEAD`.

    Comparing the read with the one line that its length allows is cheaper than parsing, and stricter: only the
    canonical form, lower-case hexadecimal without extensions, passes.
    """

    def __missing__(self, length: int) -> bytes:
        head = _NO_HEAD
        for digits in range(1, 5):  # to 65535 bytes; larger chunks are worth a parser, and this table stays small
            size = length - digits - 4
            if size > 0 and len(b"%x" % size) == digits:
                head = b"%x\r\n" % size
        self[min(length, 65536)] = head
        return head


_CHUNK_HEADS = _ChunkHeads()
_NOT_TEXT = b'"\r\n'
_BRACKET = ord("]")
_BATCH = 32  # tokens whose times and ids are put away together
_PACED = 8  # gaps from which a pace is reported: fewer are mostly the end of a stream


def _not_armed(data: bytes) -> None:
    raise AssertionError("the fast path has no client yet")


class PatternReader(Protocol):
    """What knows the events of a stream (`AnswerReader`)."""

    def pattern(self, sample: bytes) -> TokenPattern | None:
        """What an ordinary token event shows of those that are like it; None where it shows nothing."""


class FastPath(asyncio.Protocol):
    """The protocol of the engine's connection while its stream is live.

    Nothing passes before it has been armed, and after each read that it leaves to the connection until it is allowed
    again: only who parsed that read knows that it ended where a chunk and an event end.

    Arguments:
        connection: takes all that is not an ordinary token event, and everything else that happens to the connection.
        gaps: where the seconds between tokens go, some tokens at a time.
        transcript: where the ids of the tokens go that pass, if events carry some that the client must not see.
        reader: says what a sample of the stream's token events shows of the others.
        pace: called now and then with how many seconds a token takes of late; None once that says nothing about the
            engine.
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
        self._clear = False  # the last read ended where a chunk and an event end
        self.armed = False
        self._write: Callable[[bytes], object] = _not_armed
        self._sample = b""  # an ordinary event as the engine sent it, to be learnt from when the next one comes
        # What has been learnt
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
        """From now on reads may pass.

        Arguments:
            write: sends whole chunks to the client.
        """
        self._write = write
        self.armed = True

    def allow(self) -> None:
        """The last read ended where a chunk and an event end: the next one may pass."""
        self._clear = True

    def block(self) -> None:
        """The next read must not pass."""
        self._clear = False

    def forget_pace(self) -> None:
        """The time between tokens says nothing about the engine any more."""
        self._pace = None

    def learn(self, sample: bytes) -> None:
        """An ordinary token event has been read. It is learnt from when one comes that may be like it.

        Arguments:
            sample: the event as the engine sent it.
        """
        self._sample = sample

    def data_received(self, data: bytes) -> None:
        # A chunk is `size CRLF event CRLF`; an event is `prefix text behind`, and what is behind has the form of the
        # learnt one but for its digits. An event without text is not ordinary: the transcript must know of it.
        head = _CHUNK_HEADS[len(data)]
        start = len(head)
        text = start + self._prefix_length
        end = data.find(b'"', text)
        if (
            end > text
            and self._clear
            and data.startswith(head)
            and data.startswith(self._prefix, start)
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
                    # Put together at once: a large event is copied once and not four times.
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
        """Of events that came together, those at the front that are ordinary, as the client sees them; their number;
        and the rest of the block. Their times are not noted here.

        Arguments:
            block: whole events, without the transfer's framing.
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
        """From now on, events that are as the sample is are passed on."""
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

    # The times of the tokens. The first in the list is the last one that was put away.

    def count(self, tokens: int, now: float) -> None:
        """Tokens have come by the slow path, in one read: between them there is no gap."""
        self._times.append(now)
        if tokens > 1:
            self._counted += tokens - 1
            self._together += tokens - 1
        if len(self._times) > _BATCH:
            self.fold()

    def given(self) -> tuple[int, float]:
        """Token events so far, and when the last one came, as `time.monotonic`; 0 before any."""
        times = self._times
        return self._counted + len(times), times[-1] if times else 0.0

    def fold(self) -> None:
        """Put gaps and ids away."""
        self.fold_times()
        self._transcript.fold()

    def fold_times(self) -> None:
        """Put the gaps away."""
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

    # All else is the connection's.

    def eof_received(self) -> bool | None:
        return self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)
