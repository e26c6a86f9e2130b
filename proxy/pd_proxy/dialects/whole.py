"""Reads answers in one piece, and recognises the errors among them."""

from __future__ import annotations

from typing import Protocol

import msgspec

from pd_proxy.decoding import Undecodable, is_null, json_decoder
from pd_proxy.dialects.aborts import aborted
from pd_proxy.dialects.engine_errors import engine_error_event
from pd_proxy.encoding import ABSENT
from pd_proxy.errors import BackendGarbled, BackendPreempted


class WholeAnswer(msgspec.Struct):
    """What is read of an answer that was not streamed."""

    choices: msgspec.Raw = ABSENT
    content: msgspec.Raw = ABSENT
    output: msgspec.Raw = ABSENT
    usage: msgspec.Raw = ABSENT
    error: msgspec.Raw = ABSENT
    stop_reason: msgspec.Raw = ABSENT
    status: msgspec.Raw = ABSENT
    incomplete_details: msgspec.Raw = ABSENT


decode_whole = json_decoder(WholeAnswer)
"""An answer of any of OpenAI's APIs and Anthropic's. Raises `Undecodable`."""


class Shape(Protocol):
    """The form of a dialect's answers in one piece."""

    @property
    def generated(self) -> str:
        """The member that holds what was generated, which every answer has."""

    @property
    def preempted_whole(self) -> bytes:
        """Bytes by which an engine reports that it dropped the request to free memory; or empty."""

    def decode_whole(self, answer: bytes) -> WholeAnswer:
        """Decode an answer.

        Raises:
            Undecodable: it is not an answer of this API.
        """

    def abort_reason_of(self, answer: WholeAnswer) -> object:
        """The reason by which the engine aborted the request; None where it did not."""

    def error_payload(self, answer: bytes, parsed: WholeAnswer) -> bytes:
        """An object with the `error` of an answer that is an error."""


def read_checked(shape: Shape, url: str, answer: bytes) -> WholeAnswer:
    """Read an answer that came with status 200.

    Arguments:
        url: the backend, for messages.
    Raises:
        BackendError: it is an error, or the engine aborted the request, or it is not an answer.
    """
    try:
        parsed = shape.decode_whole(answer)
    except Undecodable as error:
        raise BackendGarbled(f"{url} answered 200 with what is no answer: {error}") from None
    if shape.preempted_whole and shape.preempted_whole in answer:
        raise BackendPreempted(f"{url} gave the request up for want of memory")
    missing, failed = what_is_missing(parsed, shape.generated), is_failure(parsed)
    reason = None if missing or failed else shape.abort_reason_of(parsed)
    if reason is not None:
        raise aborted(url, reason)
    if failed and (missing or not memoryview(parsed.choices)):
        raise engine_error_event(url, shape.error_payload(answer, parsed))
    if missing:
        raise BackendGarbled(f"{url} answered 200 with what is no answer: {missing}")
    return parsed


def abort_reason(shape: Shape, answer: bytes) -> object:
    """The reason by which the engine aborted the request; None where it did not, and for an error or an answer that
    cannot be read."""
    try:
        parsed = shape.decode_whole(answer)
    except Undecodable:
        return None
    reason = shape.abort_reason_of(parsed)
    return None if reason is None or is_failure(parsed) else reason


def is_failure(answer: WholeAnswer) -> bool:
    """Whether an answer is an error, unless it has choices."""
    return not is_null(answer.error) and not memoryview(answer.content) and not memoryview(answer.output)


class _Choice(msgspec.Struct):
    message: msgspec.Raw = ABSENT
    text: msgspec.Raw = ABSENT
    token_ids: msgspec.Raw = ABSENT


_decode_choices = json_decoder(list[_Choice])


def what_is_missing(answer: WholeAnswer, member: str) -> str:
    """Why an object is not an answer in one piece, or an empty string. A stream without a token is not one either.

    Arguments:
        member: the one that holds what was generated.
    """
    generated = getattr(answer, member, None)
    if generated is None:
        return ""  # its dialect has checked
    if bytes(memoryview(generated)[:1]) != b"[":
        return f"it has no list of {member}"
    if member != "choices":
        return ""  # a model may generate nothing
    try:
        choices = _decode_choices(generated)
    except Undecodable as error:
        return f"its choices are none: {error}"
    if not choices:
        return "it has no choices"
    for choice in choices:
        starts = [bytes(memoryview(raw)[:1]) for raw in (choice.message, choice.text, choice.token_ids)]
        if starts[0] != b"{" and starts[1] != b'"' and starts[2] != b"[":
            return "a choice has neither a message nor text nor token ids"
    return ""
