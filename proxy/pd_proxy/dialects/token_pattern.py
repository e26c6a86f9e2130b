"""What the token events of one stream have in common.

The events of chat's and completions' streams differ only in the token's text and its id. A sample that was parsed and
found ordinary shows what stands before the text and behind it, so that the relay's fast path can pass on the events
that follow without parsing them.
"""

from __future__ import annotations

import re
from functools import lru_cache

import msgspec

from pd_proxy.dialects.edit import Edit
from pd_proxy.dialects.strip import names_handoff

NOT_FINISHED = b'"finish_reason":null'
"""What every ordinary token event has behind its text."""
DIGITS = b"0123456789"
_TEXT = re.compile(rb'(?:"delta":\{"\w+"|"text"):"')
_IDS = b'"token_ids":['
_HIDDEN = re.compile(rb',"(?:prompt_token_ids":null|token_ids":\[)')
_BRACKET, _BACKSLASH = ord("]"), ord("\\")


class TokenPattern(msgspec.Struct, frozen=True):
    """The form of a stream's ordinary token events.

    Attributes:
        prefix: what stands before the text.
        head: that as the client sees it.
        behind: what stands behind the text, with the end of the chunk, without digits. The fast path compares it.
        id_at: where the token's id begins in what stands behind the text.
        with_ids: behind `id_at` are token ids that the client must not see.
        shown: what stands between the text and the id, as the client sees it.
        form: finds what stands behind the text in several events, with two groups: the id, and what is behind that;
            None where events do not end with two LFs.
    """

    prefix: bytes
    head: bytes
    behind: bytes
    id_at: int
    with_ids: bool
    shown: bytes
    form: re.Pattern[bytes] | None


def learn_pattern(event: bytes, edit: Edit, *, with_ids: bool) -> TokenPattern | None:
    """The pattern of an ordinary token event; None where others cannot be recognised by it.

    Arguments:
        event: as the engine sent it.
        edit: how it becomes the client's.
        with_ids: it has token ids that the client must not see.
    """
    found = _TEXT.search(event)
    if found is None or not event.startswith(b"data: {") or event.count(b"\n") != 2:
        return None
    text = found.end()
    end = event.find(b'"', text)
    mid, marker, rest = event[end:].partition(_IDS if with_ids else NOT_FINISHED)
    mid += marker
    plain = mid.find(NOT_FINISHED) >= 0 and _BRACKET not in mid and mid.translate(None, DIGITS) == mid
    around = event[:end] + rest
    if not plain or _BACKSLASH in event[text:end] or names_handoff(around):
        return None
    shown = mid
    if with_ids:
        shown = _HIDDEN.sub(b"", mid)
        if around.find(b'token_ids"') >= 0 or shown.find(b'token_ids"') >= 0:
            return None
    head = edit.head(event, text)
    if not head:
        return None
    return TokenPattern(
        event[:text],
        head,
        (mid + rest + b"\r\n").translate(None, DIGITS),
        len(mid),
        with_ids,
        shown,
        _form(mid, rest, with_ids) if event.endswith(b"\n\n") else None,
    )


@lru_cache(64)
def _form(mid: bytes, rest: bytes, with_id: bool) -> re.Pattern[bytes]:
    """The regular expression of `TokenPattern.form`. Streams of one engine share it: to compile it takes as long as
    some hundred tokens do.

    Arguments:
        mid: the bytes up to the id, or up to any place where there is no id.
        rest: the bytes from the id on.
    """
    id_, tail = (rb"(\d+)\]", rest.partition(b"]")[2]) if with_id else (b"()", rest)
    return re.compile(b"%b%b(%b)" % (re.escape(mid), id_, re.sub(rb"\d+", rb"\\d+", re.escape(tail))))
