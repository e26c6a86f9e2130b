"""How a stream's events speak where they do not speak as OpenAI's chat does: what begins an answer, what ends it, what
says that it failed, where its usage is. `dialects.py` has those that there are.
"""

from __future__ import annotations

import msgspec

from pd_proxy.decoding import Undecodable, json_decoder
from pd_proxy.dialects.aborts import abort_in
from pd_proxy.dialects.answers import Usage, WholeAnswer, read_usage, read_whole, strip_handoff
from pd_proxy.dialects.cache_counts import CacheCounts
from pd_proxy.dialects.prompt_logprobs import PromptLogprobs
from pd_proxy.errors import BackendGarbled

_ABSENT = msgspec.Raw()
_encode = msgspec.json.Encoder().encode


class NamedEvent(msgspec.Struct):
    """What is read of an event.

    Attributes:
        sequence_number: its place in the stream, where events are numbered; else -1.
    """

    type: str = ""
    sequence_number: int = -1
    usage: msgspec.Raw = _ABSENT
    response: msgspec.Raw = _ABSENT
    error: msgspec.Raw = _ABSENT
    delta: msgspec.Raw = _ABSENT


class _Answer(msgspec.Struct):
    usage: msgspec.Raw = _ABSENT
    error: msgspec.Raw = _ABSENT


_decode_event = json_decoder(NamedEvent)
_decode_answer = json_decoder(_Answer)


class Dialect(msgspec.Struct, frozen=True):
    """One way of speaking.

    Attributes:
        opening: events that give the client nothing by themselves: those before the first token, and those that close
            what has no content. An engine may say them and then fail.
        tokens: how the names of events end that bring tokens.
        last: events of which one ends the answer.
        failed: events of which one says that the engine could not finish.
        inside: members of an event that hold the answer's own object, and with it its usage.
        preempted: bytes by which an engine says that it dropped the request to get at its memory; or nothing.
        ends: events that say why the answer ended.
    """

    opening: frozenset[str]
    tokens: str
    last: frozenset[str]
    failed: frozenset[str]
    inside: tuple[str, ...]
    preempted: bytes = b""
    ends: frozenset[str] = frozenset()

    def of(self, prompts: int, logprobs: PromptLogprobs | None) -> Dialect:
        """The same for one stream, where it must be known what was said before.

        Arguments:
            prompts: how many the request has, where they are a batch; else 0.
            logprobs: of the prompts, to be put into its events.
        """
        return self

    @property
    def edits(self) -> bool:
        """Every event is made anew by `stripped`."""
        return False

    @property
    def waits(self) -> bool:
        """No event can be made yet."""
        return False

    def read(self, payload: bytes) -> NamedEvent:
        """An event.

        Raises:
            BackendGarbled: it is none.
        """
        try:
            return _decode_event(payload)
        except Undecodable as error:
            raise BackendGarbled(f"an event that is no answer: {error}") from None

    def failure(self, event: NamedEvent, payload: bytes) -> bytes:
        """An object with the `error` that an event tells of, or nothing where it tells of none."""
        if event.type not in self.failed:
            return b"" if bytes(memoryview(event.error)[:4]) in (b"", b"null") else payload
        if memoryview(event.error):
            return payload
        try:
            error = _decode_answer(event.response).error
        except Undecodable:
            error = _ABSENT
        # OpenAI's own `error` event has its parts beside its type.
        return _encode({"error": error if memoryview(error) else msgspec.Raw(payload)})

    def aborted(self, event: NamedEvent) -> object:
        """Of an event among `ends`: by which word the engine gave the request up, or None where it did not."""
        return None

    def aborted_whole(self, answer: WholeAnswer) -> object:
        """The same of an answer that was not streamed."""
        return abort_in(answer.choices)

    def empty(self, event: NamedEvent) -> bool:
        """Whether an event that counts as a token gives the client nothing to read."""
        return False

    def usage(self, event: NamedEvent) -> Usage | None:
        """The usage that an event tells of."""
        if not memoryview(event.response):
            return read_usage(event.usage)
        try:
            return read_usage(_decode_answer(event.response).usage)
        except Undecodable:
            return None

    def stripped(self, name: str, payload: bytes) -> bytes:
        """An event, without what names engines' addresses."""
        return b"event: %b\ndata: %b\n\n" % (name.encode(), strip_handoff(payload))

    def recounted(self, event: bytes, name: str, payload: bytes, counts: CacheCounts) -> bytes:
        """An event that tells of a usage, with prefill's counts in it."""
        changed = counts.into(payload)
        for inside in self.inside:
            changed = counts.into(changed, inside)
        return event if changed == payload else b"event: %b\ndata: %b\n\n" % (name.encode(), changed)

    def whole(self, answer: bytes) -> WholeAnswer:
        """An answer that was not streamed.

        Raises:
            Undecodable: it is none.
        """
        return read_whole(answer)
