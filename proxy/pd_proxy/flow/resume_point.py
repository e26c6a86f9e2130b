"""Finds the resume point of a broken answer with the help of a tokenizer, where the token ids alone do not show it.

An engine under load puts several tokens into one event, and the last of them may be a part of a character. A parser for
tool calls holds text back that could begin a tool call, which may be a part of a token. In both cases the client has
less text than the ids stand for, and the rest would be lost if the answer were continued behind them. So tokens are
dropped from the end until ids and text agree. They are generated again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from pd_proxy.relay.transcript import Transcript

Detokenize = Callable[[bytes], Awaitable[str]]
"""Ids, `1,2,3` -> their text. Raises `BackendError`."""

_LONGEST_CHARACTER = 4  # bytes in UTF-8, and so tokens at most
_LONGEST_HELD = 16  # tokens; the beginning of a tool call is shorter
_HALF = "\ufffd"  # what tokenizers write for an incomplete character


async def find_resume_point(transcript: Transcript, detokenize: Detokenize) -> str:
    """Drop tokens from the transcript's end until ids and text agree.

    Returns why there is no such place (`merged_tokens`, `held_text`), or an empty string.

    Raises:
        BackendError: the engine did not detokenize.
    """
    if transcript.text is not None:
        return await _by_text(transcript, transcript.text, detokenize)
    if transcript.unsure:
        return await _by_last_character(transcript, detokenize)
    return ""


async def _by_text(transcript: Transcript, sent: str, detokenize: Detokenize) -> str:
    for _ in range(_LONGEST_HELD):
        text = await detokenize(transcript.answer())
        if text == sent:
            return ""
        if not text.startswith(sent):
            break  # the resume point would be within a token, or the tokenizer writes the text in another way
        transcript.drop_last()
    return "held_text"


async def _by_last_character(transcript: Transcript, detokenize: Detokenize) -> str:
    for _ in range(_LONGEST_CHARACTER):
        if not (await detokenize(transcript.end())).endswith(_HALF):
            return ""
        transcript.drop_last()
    return "merged_tokens"
