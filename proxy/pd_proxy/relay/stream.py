"""The relay of a streamed answer: from the engine's socket to the client's.

Until the first event that gives the client something to read everything is held, since the engine may still answer with
an error under status 200 (vLLM does when the KV cache cannot be loaded: a role chunk, then an error event); so until
then the request can be tried elsewhere. Tokens that give nothing to read (a stop string or a parser holds their text
back) wait as well. From that event on, each read from the engine is one write to the client: ordinary token events
take the straight way (`passage.py`), and what is unlike them is read here, event by event.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from time import monotonic
from typing import Any

import msgspec

from pd_proxy.decoding import UNDECODABLE, Undecodable, bare_json_decoder, decode_json
from pd_proxy.dialects import sse as events
from pd_proxy.dialects.aborts import ORDINARY, abort_of, aborted
from pd_proxy.dialects.answers import Usage, engine_error, engine_error_event, names_handoff, read_usage
from pd_proxy.dialects.dialect import Dialect
from pd_proxy.dialects.edit import Edit, take_prompt_ids
from pd_proxy.errors import (
    BackendCut,
    BackendError,
    BackendFailed,
    BackendGarbled,
    BackendPreempted,
    BackendTimedOut,
)
from pd_proxy.http.client import Connection
from pd_proxy.http.deadlines import Deadlines
from pd_proxy.http.response import Client
from pd_proxy.relay.fast_path import PLAIN, FastPath
from pd_proxy.relay.transcript import Transcript
from pd_proxy.telemetry.records import Distribution

log = logging.getLogger("pd_proxy.relay")

_HELD_LIMIT = 64 * 1024 * 1024  # the ids of a prompt of a million tokens are 7 MB, and come before the first token
_DOUBT = 1.0  # seconds of silence that are the last straw for a backend which fails its health checks
_PACES = 4  # usual gaps between tokens that are silence: a slow stream moves too
_LATE = 0.25  # share of these seconds that the event loop may be late; else it listens once more
_LOOKS = 5  # times that it listens, at most
_ERROR_BODY_LIMIT = 1024 * 1024
_LARGE = 2048  # bytes of several events
_ASIDE = 1024 * 1024  # bytes of events that wait; more are left in the engine
_MANY = 4  # tokens in one read
_FEW = 3  # events: an opening one, one with the prompt's ids, one like those that follow
# Seconds for which tokens without content are held: an engine that hides minutes of reasoning must not look dead.
_LONGEST_HOLD = 5.0


_ABSENT = msgspec.Raw()


class _Choice(msgspec.Struct):
    index: Any = 0
    delta: dict[str, Any] | None = None
    text: str | None = None
    finish_reason: Any = None
    stop_reason: Any = None
    token_ids: msgspec.Raw = _ABSENT
    prompt_token_ids: msgspec.Raw = _ABSENT


class _Event(msgspec.Struct):
    """What the relay reads of an event when it reads one at all."""

    choices: list[_Choice] | None = None
    usage: msgspec.Raw = _ABSENT
    error: Any = None
    prompt_token_ids: msgspec.Raw = _ABSENT


_ODD = re.compile(rb'"recomputed"|"error":')
_decode_event = bare_json_decoder(_Event)


def carries_token(event: _Event) -> bool:
    """Whether an event shows that decode has begun to answer: any choice beyond the opening role chunk."""
    choices = event.choices
    if not choices:
        return False
    choice = choices[0]
    if choice.delta is None or "role" not in choice.delta or choice.finish_reason is not None:
        return True
    if choice.delta.get("content") or _has_more(choice.delta):
        return True
    return len(choices) > 1 and carries_token(_Event(choices[1:]))


_OPENING = frozenset({"role", "content"})


def _has_more(delta: dict[str, Any]) -> bool:
    """Whether a delta gives the client anything beside a role and content."""
    return not delta.keys() <= _OPENING and any(value for name, value in delta.items() if name not in _OPENING)


def _has_content(choices: list[_Choice]) -> bool:
    """Whether an event gives the client anything to read, or says that an answer has ended. Tokens in, tokens out
    (neither text nor a delta) is read by its ids."""
    for choice in choices:
        delta = choice.delta
        if choice.finish_reason is not None or choice.text:
            return True
        if delta is None:
            if choice.text is None and bytes(choice.token_ids) not in (b"", b"null", b"[]"):
                return True
        elif delta.get("content") or _has_more(delta):
            return True
    return False


def _inner(ids: bytes) -> bytes:
    """The ids of a JSON list without its brackets; nothing for null and for what is no list."""
    return ids[1:-1] if ids.startswith(b"[") else b""


class StreamRelay:
    """A receiver that passes a stream of events on to a client.

    Arguments:
        url: the backend, for messages.
        client: where the events go.
        begin: called once, with this relay, just before the first bytes go out; it starts the client's answer.
        heard: called once, with this relay, when the engine's first token is here, whether or not it is to be read.
        pace: told now and then how many seconds a token takes the engine.
        gaps: where the gaps between tokens are noted, in seconds.
        transcript: where it is written down what the client was given.
        edit: how this leg's events become the client's.
        drop_usage: take out the closing usage event, which the gateway asked for and the client did not.
        idle: seconds without a byte after which the stream counts as dead, or None.
        loop: the running one, for those who know it.
        dialect: how its events speak, where they do not speak as chat's do.
    Attributes:
        sequence: the number of the last event that the client was given, where events are numbered; else -1.
        first_token: `time.monotonic` of the read that brought the first content; None before.
        usage: the last usage the engine reported, of this leg alone.
        throttled: the client has been slow, so that the stream's pace says nothing about the engine.
    """

    __slots__ = (
        "_begin",
        "_begun",
        "_client",
        "_connection",
        "_content",
        "_dialect",
        "_done",
        "_doubted",
        "_drop_usage",
        "_early",
        "_edit",
        "_error_body",
        "_failure",
        "_future",
        "_gaps",
        "_heard",
        "_heard_first",
        "_held",
        "_held_size",
        "_hollow",
        "_idle",
        "_last",
        "_last_word",
        "_loop",
        "_opened",
        "_opening",
        "_over",
        "_pace",
        "_passage",
        "_patience",
        "_paused_since",
        "_prompt",
        "_reader",
        "_status",
        "_timer",
        "_transcript",
        "_url",
        "_waiting",
        "first_token",
        "headers",
        "sequence",
        "throttled",
        "usage",
    )

    def __init__(
        self,
        url: str,
        client: Client,
        begin: Callable[[StreamRelay], None],
        gaps: Distribution,
        transcript: Transcript,
        edit: Edit,
        *,
        drop_usage: bool,
        idle: float | None,
        loop: asyncio.AbstractEventLoop | None = None,
        dialect: Dialect | None = None,
        heard: Callable[[StreamRelay], None] | None = None,
        pace: Callable[[float], object] | None = None,
    ) -> None:
        self._url = url
        self._dialect = dialect
        self._heard_first = heard
        self._pace = pace
        self._begun: float | None = None  # when the engine's first token came
        self._content = False  # something has come for the client to read
        self.sequence = -1
        self._client = client
        self._begin = begin
        self._gaps = gaps
        self._transcript = transcript
        self._edit = edit
        self._idle = idle
        self._drop_usage = drop_usage
        self._connection: Connection | None = None
        self._loop = loop or asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self._loop.create_future()
        self._reader: events.EventReader | None = None  # from the first read on that ends within an event
        self._held: list[bytes] = []  # what goes to the client with the first token
        self._held_size = 0
        self._prompt = b""  # its ids
        self._opening: bytes | None = None  # the first event with a choice, as the client sees it
        self._opened = False  # the transcript knows of that
        self._early: list[bytes] = []  # ids that came before the first token
        self._heard = 0.0
        self._last = b""
        self._last_word = b""  # [DONE], or the event that stands for it
        self._hollow = b""  # events without text, as the client will see them together with the next that has some
        self._waiting: list[bytes] = []  # what cannot be made the client's yet
        self._over = False  # the engine has said all of it
        self._error_body = bytearray()
        self._status = 0
        self._passage: FastPath | None = None
        self._done = False
        self._failure: BackendError | None = None
        self._patience: Deadlines | None = None
        self._paused_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._doubted = -1.0  # its last sign when it was doubted, while that is to be seen
        self.headers: dict[bytes, bytes] = {}
        self.first_token: float | None = None
        self.usage: Usage | None = None
        self.throttled = False

    # What the flow uses

    async def run(self, connection: Connection, first_token: Deadlines) -> None:
        """Relay until the engine's stream ends as it should: with `[DONE]`, or with what its dialect has instead.

        Arguments:
            first_token: how long to wait for that.
        Raises:
            BackendError: it ended in any other way. If `first_token` is None the client has seen nothing of it.
        """
        self._connection = connection
        edit = self._edit
        self._passage = FastPath(
            connection,
            self._gaps,
            self._transcript if edit.hide_ids else None,
            edit if edit.identity is not None else None,
            self._pace,
        )
        self._client.flow = self
        if not self._future.done():
            self._patience = first_token
            first_token.watch(self, self._loop)
        try:
            await self._future
        finally:
            self._client.flow = None
            if self._patience is not None:
                self._patience.forget(self)
            if self._timer is not None:
                self._timer.cancel()
            self._abort()
            if self._passage is not None:
                self._passage.fold_times()

    def fail(self, error: BackendError) -> None:
        """End the stream from outside, as if the backend had failed with `error`."""
        self._abort()
        self.lost(error)

    def doubt(self, error: BackendError) -> None:
        """The backend is said to be dead. A stream that moves is believed more than that; one that is silent from now
        on fails with `error`, after `_DOUBT` seconds or `_PACES` times its usual gap between tokens.

        Silence before the doubt counts for nothing: where the gateway stood still, it has read nothing meanwhile. So
        does the silence of a time in which the event loop was late."""
        if self._paused_since is not None:
            return  # it is the client that keeps it waiting
        heard, loop = self._last_sign(), self._loop
        if self._doubted == heard:
            return  # it is being listened to
        seconds = max(_DOUBT, _PACES * self._usual_gap())
        if self._idle is not None:
            seconds = min(seconds, self._idle)
        looks = 0

        def look(due: float) -> None:
            nonlocal looks
            looks += 1
            if self._last_sign() != heard or self._paused_since is not None:
                self._doubted = -1.0
                if self._idle is not None:
                    self._check_idle()
            elif loop.time() - due > _LATE * seconds and looks < _LOOKS:
                wait()
            else:
                self.fail(error)

        def wait() -> None:
            due = loop.time() + seconds
            self._timer = loop.call_at(due, look, due)

        if self._timer is not None:
            self._timer.cancel()
        self._doubted = heard
        wait()

    def _usual_gap(self) -> float:
        """The mean gap between its tokens, in seconds; 0 before the second."""
        count, last = self.given()
        return (last - self._begun) / (count - 1) if count > 1 and self._begun is not None else 0.0

    def go_on(self, _: object = None) -> None:
        """What the dialect waited for is here."""
        if not self._waiting or self._future.done():
            return
        connection = self._connection
        block, self._waiting = b"".join(self._waiting), []
        try:
            if connection is not None:
                connection.resume()
            self._pass_on(block, self._over)
            if self._over and not self._future.done():
                self.end()
        except Exception as fault:  # it is called by the event loop, which would forget the stream
            log.error("%s: the gateway failed on this engine's answer", self._url, exc_info=fault)
            self._transcript.give_up()
            self.fail(BackendGarbled(f"{self._url}: the gateway failed on its answer ({type(fault).__name__})"))

    @property
    def live(self) -> bool:
        """Whether the client has been given anything of this leg."""
        return self.first_token is not None

    def given(self) -> tuple[int, float]:
        """Token events passed on, and `time.monotonic` of the read that brought the last token; 0 before any."""
        return self._passage.given() if self._passage is not None else (0, 0.0)

    # Flow: called by the client's side

    def pause(self) -> None:
        self.throttled = True
        if self._passage is not None:
            self._passage.pace = None
        self._paused_since = monotonic()
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        self._paused_since = None
        self._heard = monotonic()  # time spent waiting for the client is not the engine's silence
        if self._connection is not None:
            self._connection.resume()

    def stop(self) -> None:
        self._abort()

    # Receiver: called by the engine's side

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._status = status
        self.headers = headers

    def data(self, data: bytes, last: bool) -> None:
        if self._status != 200:
            self._error_body += data[: _ERROR_BODY_LIMIT - len(self._error_body)]
            return
        try:
            if self._reader is None and data.endswith(b"\n\n"):
                block = data
            else:
                if self._reader is None:
                    self._reader = events.EventReader()
                block = self._reader.feed(data)
            if block:
                self._pass_on(block, last)
            if not self._done and self.first_token is not None:
                self._open_passage()
        except BackendGarbled as error:
            self.fail(error)
        except Exception:
            self._transcript.give_up()
            raise

    def end(self) -> None:
        self._connection = None
        if self._waiting:
            self._over = True  # whether it ended well is seen when it is read
            return
        if self._done:
            if self.first_token is not None:
                self._conclude(None)
            else:  # a whole stream without a token is no answer
                self._finish(BackendFailed(f"{self._url} ended its stream without a token", status=502))
        elif self._status != 200:
            self._finish(engine_error(self._url, self._status, self.headers, bytes(self._error_body)))
        else:
            lacks = "[DONE]" if self._dialect is None else "its last event"
            self._finish(BackendCut(f"{self._url} ended its stream without {lacks}"))

    def lost(self, error: BackendError) -> None:
        self._connection = None
        try:
            if self._done and self.live:  # a connection that breaks after [DONE] broke nothing
                self._conclude(error)
        finally:
            self._finish(error)  # unless that is done

    def _conclude(self, error: BackendError | None) -> None:
        """The engine has said `[DONE]`: the answer is whole if it also said why it ended, else it failed; with `error`,
        if there is one."""
        if self._transcript.finished:
            if self.usage is None and not self._drop_usage and self._transcript.continuable:
                self._last_word = self._transcript.closing(usage=True)  # its engine left out what the client wants
            self._client.end(self._last + self._last_word)
            self._finish(None)
            return
        if self._last:
            self._client.write(self._last)
        self._finish(error or BackendCut(f"{self._url} said [DONE] without a finish_reason"))

    # From reads to events to writes

    def _pass_on(self, block: bytes, last: bool) -> None:
        """Whole events go to the client, the last ones together with the end of its answer. Until there is a token
        among them they are held."""
        now = self._heard = monotonic()
        passage = self._passage
        assert passage is not None
        shown, count = self._take(block, last)
        if count:
            passage.count(count, now)
        if self.first_token is None:
            if self._future.done():
                return  # the flow has given it up in this very turn, and is on its way elsewhere
            if count and self._begun is None:
                self._hear(now, last)
            if self._failure is not None:  # the client has nothing yet: all of it can be begun anew elsewhere
                if self._opened:
                    self._transcript.rewind()
                self.fail(self._failure)
                return
            if not self._content and (self._begun is None or now - self._begun < _LONGEST_HOLD):
                self._hold(shown)
                return
            if self._held:
                shown, self._held = b"".join(self._held) + shown, []
            self._go_live(now)
        self._write(shown, last, count)
        if count >= _MANY and not self._transcript.finished and self._connection is not None:
            self._connection.rest(self._loop)

    def _hold(self, shown: bytes) -> None:
        if shown:
            self._held.append(shown)
        self._held_size += len(shown)
        if self._held_size + len(self._prompt) > _HELD_LIMIT:
            self.fail(BackendGarbled(f"{self._url} sent {_HELD_LIMIT} bytes without a token"))

    def _go_live(self, now: float) -> None:
        """From now on the client sees what the engine sends."""
        self.first_token = now
        if not self._opened and self._opening is not None:
            self._open_transcript(self._opening)
        self._begin(self)

    def _hear(self, now: float, last: bool) -> None:
        """The engine's first token is here."""
        self._begun = now
        if self._patience is not None:
            self._patience.forget(self)
            self._patience = None
        if self._heard_first is not None:
            self._heard_first(self)
        if not last and self._connection is not None and self._idle is not None:
            self._timer = self._loop.call_later(self._idle, self._check_idle)

    def _write(self, block: bytes, last: bool, tokens: int) -> None:
        # `[DONE]` alone waits for the end of the engine's answer, which is on its way, so that both go out at once.
        if self._last:
            block, self._last = self._last + block, b""
        if self._done and (last or not tokens):
            self._last = block
        elif block:
            self._client.write(block)
        if self._failure is not None:
            self.fail(self._failure)

    @property
    def _may_pass(self) -> bool:
        """Whether ordinary events need not be read. A client that wants the token ids itself gets them as they come,
        while the transcript is told of them."""
        return self._dialect is None and (self._edit.hide_ids or not self._transcript.continuable)

    def _open_passage(self) -> None:
        """Reads may go straight on from here if nothing is half read."""
        connection, passage = self._connection, self._passage
        assert passage is not None
        if connection is None or self._client.gone:
            return
        if passage.write is None:
            if not self._may_pass:
                return
            passage.write = self._client.chunks()
            if passage.write is None:
                return
            connection.divert(passage)
        whole = not (self._hollow or (self._reader is not None and self._reader.partial))
        passage.clear = whole and connection.between_chunks

    def _take(self, block: bytes, last: bool) -> tuple[bytes, int]:
        """What of a block the client is given, and the number of its token events."""
        if self._dialect is not None:
            if self._dialect.waits:
                self._set_aside(self._dialect, block)
                return b"", 0
            return self._take_named(self._dialect, events.read(block))
        passage, live = self._passage, self.first_token is not None
        assert passage is not None
        if live and not self._transcript.continuable and self._edit.idle:
            count = block.count(b"\n\n")
            ordinary = (
                count
                and count == block.count(b'"choices":[{') == block.count(b'"finish_reason":null')
                and count == block.count(b'"finish_reason"')  # no choice beside it has ended
            )
            if ordinary and b"\r" not in block and not names_handoff(block) and not _ODD.search(block):
                if count == 1:
                    passage.pattern = block
                return block, count
        if len(block) <= _LARGE and not (live and block.find(PLAIN) >= 0):
            return self._inspect(block, last)
        shown, count, rest = b"", 0, block
        if not live:
            # An answer that begins with many events at once: its first ones show what the others are like.
            rest = block.split(b"\n\n", _FEW)[-1]
            shown, count = self._inspect(block[: len(block) - len(rest)], False)
            if self._failure is not None:
                return shown, count
        if (live or count) and self._may_pass:
            more, taken, rest = passage.take(rest)
            if taken:
                shown += self._hollow + more
                self._hollow = b""
                count += taken
        if rest:
            more, taken = self._inspect(rest, last)
            shown += more
            count += taken
        return shown, count

    def _inspect(self, block: bytes, last: bool) -> tuple[bytes, int]:
        """Look at events one by one.

        Returns them as the client sees them, and the number of token events among them. The look ends with an event
        that ends the stream; `_failure` is told to the flow once the events before it are out, and the flow says it to
        the client in its own words.
        """
        edit, transcript, passage = self._edit, self._transcript, self._passage
        assert passage is not None
        kept: list[bytes] = []
        count = 0
        # Looked for once in all of them: nearly none has either.
        odd, recomputed = names_handoff(block), block.find(b"recomputed") >= 0
        for event, payload in events.read(block):
            if payload == b"[DONE]":
                self._done = True
                self._last_word = event
                continue
            if not payload:
                kept.append(event)  # a comment that keeps the connection alive
                continue
            if edit.hide_ids and self._opening is None and not self._prompt:
                event, self._prompt = take_prompt_ids(event)
                if self._prompt:
                    payload = events.payload(event)
            try:
                parsed = _decode_event(payload)
            except UNDECODABLE as error:
                self._failure = BackendGarbled(f"{self._url} sent an event that is no answer: {error}")
                break
            if parsed.error is not None:
                self._failure = engine_error_event(self._url, payload)
                break
            if recomputed and _preempted(parsed):
                self._failure = BackendPreempted(f"{self._url} gave the request up for want of memory")
                break
            choices = parsed.choices
            if parsed.usage is not _ABSENT and (usage := read_usage(parsed.usage)):
                self.usage = usage
                if not choices and self._drop_usage:
                    continue
                if choices and usage.prompt_tokens_details is not None:
                    event, payload = edit.recounted(event, payload)
            if not choices:
                try:
                    kept.append(edit.closing(event, payload, self.usage))
                except Undecodable as error:
                    self._failure = BackendGarbled(f"{self._url} sent an event that cannot be edited: {error}")
                    break
                continue
            choice = choices[0]
            delta = choice.delta
            said = choice.text if delta is None else delta.get("content")
            text = bool(said) or (delta is not None and _has_more(delta))
            finished, several = choice.finish_reason is not None, len(choices) > 1
            if (several or (finished and choice.finish_reason not in ORDINARY)) and (
                reason := abort_of(choices)
            ) is not None:
                # Text that comes with it is of tokens behind the last one whose text was sent: they are made again.
                self._failure = aborted(self._url, reason)
                break
            ids = b"" if choice.token_ids is _ABSENT else bytes(choice.token_ids)
            silent = not text and not finished and delta is not None and self._is_silent(delta, payload)
            try:
                shown = b"" if silent else edit.event(event, payload, ids, odd)
            except Undecodable as error:
                self._failure = BackendGarbled(f"{self._url} sent an event that cannot be edited: {error}")
                break
            if self._opening is None:
                self._opening = shown
                if not self._prompt:
                    self._prompt = _inner(bytes(parsed.prompt_token_ids) or bytes(choice.prompt_token_ids))
            if not (text or carries_token(parsed)):
                if ids:
                    self._early.append(ids)
                    self._held_size += len(ids)
                kept.append(shown)
                continue
            count += 1
            if not self._content:
                if not text and not _has_content(choices) and self.first_token is None:
                    if ids:
                        self._early.append(ids)
                        self._held_size += len(ids)
                    kept.append(shown)
                    continue
                self._content = True
            if not self._opened:
                self._open_transcript(self._opening)
            if several or finished:
                transcript.close([choice.index for choice in choices if choice.finish_reason is not None])
            if text and not said:
                assert delta is not None
                transcript.spoil("tool_calls" if delta.get("tool_calls") else "reasoning")
            if transcript.continuable:
                transcript.note(_inner(ids), said or text)
                if not text and not finished and (delta is None or "role" not in delta):
                    # One without text waits for the next with text: should the stream be resumed before that, its
                    # token is generated again.
                    self._hollow += shown
                    continue
            if self._hollow:
                shown, self._hollow = self._hollow + shown, b""
            kept.append(shown)
            if text and not last and _ordinary(choices):
                passage.pattern = event
        return b"".join(kept), count

    def _take_named(self, dialect: Dialect, found: list[tuple[bytes, bytes]]) -> tuple[bytes, int]:
        """The same for events that have names. One that follows the opening ones counts as a token even where it brings
        none: an answer may be empty."""
        kept: list[bytes] = []
        count = 0
        counted = None if self._edit.counts is None else self._edit.counts()
        for event, payload in found:
            if self._done:
                self._last_word += event
                continue
            if not payload:
                kept.append(event)  # a comment that keeps the connection alive
                continue
            try:
                named = dialect.read(payload)
                if dialect.edits or names_handoff(event):
                    event = dialect.stripped(named.type, payload)
                    payload = events.payload(event)
            except (BackendGarbled, Undecodable) as error:
                self._failure = BackendGarbled(f"{self._url} sent what cannot be read: {error}")
                break
            if failed := dialect.failure(named, payload):
                self._failure = engine_error_event(self._url, failed)
                break
            if named.type in dialect.ends and (reason := dialect.aborted(named)) is not None:
                self._failure = aborted(self._url, reason)
                break
            if dialect.preempted and payload.find(dialect.preempted) >= 0:
                self._failure = BackendPreempted(f"{self._url} gave the request up for want of memory")
                break
            usage = dialect.usage(named)
            if usage is not None:
                self.usage = usage
            if counted is not None and (usage is not None or named.type in dialect.opening):
                event = dialect.recounted(event, named.type, payload, counted)
            if named.type in dialect.last:
                self._done = self._transcript.finished = True
                self._last_word = event
            else:
                kept.append(event)
            self.sequence = max(self.sequence, named.sequence_number)
            if named.type.endswith(dialect.tokens) or (
                not count and self.first_token is None and named.type not in dialect.opening
            ):
                count += 1
                if not self._content:
                    self._content = not dialect.empty(named)
        return b"".join(kept), count

    def _set_aside(self, dialect: Dialect, block: bytes) -> None:
        """Keep events until their dialect can make them the client's. That the engine has failed is seen at once."""
        for _, payload in events.read(block):
            try:
                failed = dialect.failure(dialect.read(payload), payload) if payload else b""
            except (BackendGarbled, Undecodable) as error:
                self._failure = BackendGarbled(f"{self._url} sent what cannot be read: {error}")
                return
            if failed:
                self._failure = engine_error_event(self._url, failed)
                return
        self._waiting.append(block)
        if sum(map(len, self._waiting)) > _ASIDE and self._connection is not None:
            self._connection.pause()

    def _open_transcript(self, opening: bytes) -> None:
        """The first event with content is here, so that the client will be given it and what came before it."""
        self._opened = True
        self._transcript.mark()
        if not self._transcript.first:
            self._transcript.open(opening, self._prompt)
        for ids in self._early:
            self._transcript.note(_inner(ids), False)

    def _is_silent(self, delta: dict[str, Any], payload: bytes) -> bool:
        """Whether an event without text is not for this client: nothing in it is what the client asked for, and it
        would not be there if the gateway had not asked for token ids (a parser holds its token back), or it opens an
        answer that has begun."""
        if not delta:
            return self._edit.hide_ids and _is_frame(payload)
        opens_again = self._edit.identity is not None and not self._edit.opens and "role" in delta
        return opens_again and _is_frame(payload, frame=_OPENING_FRAME)

    # Endings

    def overdue(self, seconds: float) -> None:
        self.fail(BackendTimedOut(f"{self._url} sent no token within {seconds:g} s"))

    def _last_sign(self) -> float:
        """When the engine was last heard of."""
        return max(self._heard, self.given()[1])

    def _check_idle(self) -> None:
        """Fires at most once an idle period: a stream that moves costs one timer in that time, not one a token."""
        assert self._idle is not None
        since = self._paused_since or self._last_sign()
        left = since + self._idle - monotonic()
        if left > 0:
            self._timer = self._loop.call_later(left, self._check_idle)
        elif self._paused_since is not None:
            self._client.cut()  # it reads nothing, and holds an engine's memory
        else:
            self.fail(BackendTimedOut(f"{self._url} sent nothing for {self._idle:g} s"))

    def _abort(self) -> None:
        if self._passage is not None:
            self._passage.clear = False
        if self._connection is not None:
            self._connection.abort()
            self._connection = None

    def _finish(self, error: BackendError | None) -> None:
        if self._future.done():
            return
        if error is None:
            self._future.set_result(None)
        else:
            self._future.set_exception(error)


_FRAME = frozenset({"id", "object", "created", "model", "system_fingerprint", "choices", "prompt_token_ids"})
_OPENING_FRAME = _FRAME | {"usage"}  # it counts no token that the event before had not counted
_CHOICE_FRAME = frozenset({"index", "delta", "token_ids", "prompt_token_ids"})


def _is_frame(payload: bytes, frame: frozenset[str] = _FRAME) -> bool:
    """Whether an event carries nothing beside what every event has, `frame`, and token ids: no logprobs, no usage,
    nothing that is not known here."""
    try:
        members: dict[str, Any] = decode_json(payload)
    except Undecodable:  # in what the relay does not read
        return False
    if any(value is not None and name not in frame for name, value in members.items()):
        return False
    return all(
        value is None or name in _CHOICE_FRAME for choice in members["choices"] for name, value in choice.items()
    )


def _preempted(event: _Event) -> bool:
    """Whether the engine has dropped the request to get at its memory (vllm-ascend's recompute scheduler)."""
    choices = event.choices
    return choices is not None and len(choices) == 1 and choices[0].stop_reason == "recomputed"


def _ordinary(choices: list[_Choice]) -> bool:
    """Whether an event is one of those that follow each other in a stream: one choice, text, nothing else."""
    if len(choices) != 1 or choices[0].finish_reason is not None:
        return False
    return choices[0].delta is None or list(choices[0].delta) == ["content"]
