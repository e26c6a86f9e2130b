"""The straight way from the engine's socket to the client's: a live stream's token events, recognised by comparison.

One stream's token events are alike but for the text and the id of the token. From one that was read and found to be an
ordinary token event, `Passage` learns what stands before the text and behind it; from then on a read that is one whole
chunk with such an event is passed on without being parsed, and of several events that come together those at the front
are taken as one piece. Everything else, and whatever is unlike in a single byte, goes the long way through the HTTP
parser and the relay. So what passes here differs from a vetted event in the text of one JSON string (which holds no
quote) and in digits behind it, and can hide neither an error nor an address.

These are the gateway's hottest lines: bytes methods on the read itself, one system call, and no call of our own.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise, takewhile
from time import monotonic

from pd_proxy.dialects.answers import names_handoff
from pd_proxy.dialects.edit import Edit
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
_TEXT = re.compile(rb'(?:"delta":\{"\w+"|"text"):"')
_IDS = b'"token_ids":['
_HIDDEN = re.compile(rb',"(?:prompt_token_ids":null|token_ids":\[)')
_NOT_TEXT = b'"\r\n'
PLAIN = b'"finish_reason":null'
_DIGITS = b"0123456789"
_BRACKET, _BACKSLASH = ord("]"), ord("\\")
_BATCH = 32  # tokens whose times and ids are put away together
_PACED = 8  # gaps from which a pace is told: fewer are mostly the end of a stream


@lru_cache(64)
def _form(mid: bytes, rest: bytes, with_id: bool) -> re.Pattern[bytes]:
    """What stands behind the text of events that are alike, with two groups: the id, and what is behind that. Streams
    of one engine share it; to compile it takes as long as some hundred tokens do.

    Arguments:
        mid: up to the id, or to some place if there is none.
        rest: from the id on.
    """
    id_, tail = (rb"(\d+)\]", rest.partition(b"]")[2]) if with_id else (b"()", rest)
    return re.compile(b"%b%b(%b)" % (re.escape(mid), id_, re.sub(rb"\d+", rb"\\d+", re.escape(tail))))


class FastPath(asyncio.Protocol):
    """The protocol of the engine's connection while its stream is live.

    Arguments:
        connection: takes all that is not an ordinary token event, and everything else that befalls the connection.
        gaps: where the seconds between tokens go, some tokens at a time.
        transcript: where the ids of the tokens go that pass; None when events carry none that must be taken out.
        edit: how what stands before an event's text becomes the client's; None where it stays as it is.
        pace: told now and then how many seconds a token takes of late; None once that says nothing about the engine.
    Attributes:
        clear: the last read ended where a chunk and an event end. Whoever handles the long way sets it.
        pattern: an ordinary token event as the engine sent it, to be learnt from when the next one comes; or empty.
        write: sends whole chunks to the client; None while nothing may pass.
    """

    __slots__ = (
        "_around",
        "_behind",
        "_connection",
        "_counted",
        "_edit",
        "_form",
        "_gaps",
        "_head",
        "_ids",
        "_mid_length",
        "_prefix",
        "_prefix_length",
        "_shown",
        "_texts",
        "_times",
        "_together",
        "_transcript",
        "clear",
        "pace",
        "pattern",
        "write",
    )

    def __init__(
        self,
        connection: asyncio.Protocol,
        gaps: Distribution,
        transcript: Transcript | None,
        edit: Edit | None = None,
        pace: Callable[[float], object] | None = None,
    ) -> None:
        self._connection = connection
        self._gaps = gaps
        self._transcript = transcript
        self._edit = edit
        self.pace = pace
        self._ids = None if transcript is None else transcript.fresh
        self._texts = None if transcript is None else transcript.fresh_text
        self._prefix = _NO_HEAD  # until an event has been learnt
        self._prefix_length = 0
        self._head = b""
        self._behind = b""
        self._mid_length = 0
        self._shown = b""
        self._around = 0
        self._form: re.Pattern[bytes] | None = None  # what is behind the text of ordinary events
        self._times: list[float] = []  # of reads
        self._counted = 0
        self._together = 0  # tokens that came with the one before them
        self.clear = False
        self.pattern = b""
        self.write: Callable[[bytes], object] | None = None

    def data_received(self, data: bytes) -> None:
        # A chunk is `size CRLF event CRLF`; an event is `prefix text behind`, and what is behind has the form of the
        # learnt one but for its digits. An event without text is not ordinary: the transcript must know of it.
        head = _CHUNK_HEADS[len(data)]
        start = len(head)
        text = start + self._prefix_length
        end = data.find(b'"', text)
        if (
            end > text
            and self.clear
            and data.startswith(head)
            and data.startswith(self._prefix, start)
            and (behind := data[end:]).translate(None, _DIGITS) == self._behind
            and (self._ids is None or behind[self._mid_length] != _BRACKET)
        ):
            ids = self._ids
            if ids is None:
                if self._edit is not None:
                    data = data[text:]
                    data = b"%x\r\n%b%b" % (len(self._head) + len(data) - 2, self._head, data)
                self.write(data)  # type: ignore[misc]  # it is set whenever `clear` is
            else:
                # `behind` is `mid id ] tail`; the client gets `shown tail`.
                stop = behind.find(b"]")
                ids.append(behind[self._mid_length : stop])
                said, tail = data[text:end], behind[stop + 1 :]
                if self._texts is not None:
                    self._texts.append(said)
                self.write(  # type: ignore[misc]
                    # Put together at once: a large event is copied once and not four times.
                    b"%x\r\n%b%b%b%b" % (self._around + len(said) + len(tail), self._head, said, self._shown, tail)
                )
            times = self._times
            times.append(monotonic())
            if len(times) > _BATCH:
                self.fold()
        elif self.pattern and data.find(PLAIN) >= 0:
            self._learn()
            self.data_received(data)
        else:
            self.clear = False
            self._connection.data_received(data)

    def take(self, block: bytes) -> tuple[bytes, int, bytes]:
        """Of events that came together, those at the front that are ordinary, as the client sees them; their number;
        and the rest of the block. Their times are not noted here.

        Arguments:
            block: whole events, without the transfer's framing.
        """
        if self.pattern and block.find(PLAIN) >= 0:
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
        elif self._edit is None:
            return block[: len(block) - len(rest)], count, rest
        parts[1::3] = [self._shown] * count
        if self._edit is not None:
            parts[::3] = [self._head + text for text in texts]
        return b"".join(parts), count, rest

    def _learn(self) -> None:
        """From now on, events that are as `pattern` is are passed on."""
        event, self.pattern = self.pattern, b""
        found = _TEXT.search(event)
        if found is None or not event.startswith(b"data: {") or event.count(b"\n") != 2:
            return
        text = found.end()
        end = event.find(b'"', text)
        mid, marker, rest = event[end:].partition(_IDS if self._ids is not None else PLAIN)
        mid += marker
        plain = mid.find(PLAIN) >= 0 and _BRACKET not in mid and mid.translate(None, _DIGITS) == mid
        around = event[:end] + rest
        if not plain or _BACKSLASH in event[text:end] or names_handoff(around):
            return
        if self._ids is not None and around.find(b'token_ids"') >= 0:
            return
        shown = mid if self._ids is None else _HIDDEN.sub(b"", mid)
        if self._ids is not None and shown.find(b'token_ids"') >= 0:
            return
        head = event[:text] if self._edit is None else self._edit.head(event, text)
        if not head:
            return
        self._head = head
        self._prefix = event[:text]
        self._prefix_length = text
        self._behind = (mid + rest + b"\r\n").translate(None, _DIGITS)
        self._mid_length = len(mid)
        self._shown = shown
        self._around = len(head) + len(shown) - 2  # the CRLF behind an event is in its tail
        self._form = _form(mid, rest, self._ids is not None) if event.endswith(b"\n\n") else None

    # The times of the tokens. The first in the list is the last one that was put away.

    def count(self, tokens: int, now: float) -> None:
        """Tokens have come the long way, in one read: between them there is no gap."""
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
        if self._transcript is not None:
            self._transcript.fold()

    def fold_times(self) -> None:
        """Put the gaps away."""
        times = self._times
        if len(times) > 1:
            self._gaps.observe_all([after - before for before, after in pairwise(times)])
            gaps = len(times) - 1
            self._counted += gaps
            if self.pace is not None and gaps >= _PACED:
                self.pace((times[-1] - times[0]) / (gaps + self._together))
            del times[:-1]
        if self._together:
            self._gaps.observe_none(self._together)
            self._together = 0

    # All else is the connection's.

    def eof_received(self) -> bool | None:
        return self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)
