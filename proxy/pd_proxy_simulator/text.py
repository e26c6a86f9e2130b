"""Turns tokens into text, one token at a time. Bytes that are not yet a character, and possible stop strings, are held
back.

Invariant: the returned pieces, joined, are a prefix of the final text; no piece has to be taken back.
"""

from __future__ import annotations

from pd_proxy_simulator.tokens import FIRST_SPECIAL, TEXT, VOCABULARY


class TextAssembler:
    """The text of one sequence's output as it grows."""

    __slots__ = ("_held", "_started")

    def __init__(self) -> None:
        self._held = b""
        self._started = False

    def push(self, token: int) -> str:
        """Returns the text that `token` completed; empty while a character is still incomplete."""
        text = TEXT[token]
        if text is not None and not self._held:
            self._started = True
            return text
        if token >= FIRST_SPECIAL:
            return ""
        held = self._held + VOCABULARY[token]
        if not self._started:
            # The rest of a character whose beginning is in the prompt: real engines lose it too.
            held = held.lstrip(bytes(range(0x80, 0xC0)))
        try:
            whole = held.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and error.end == len(held):
                self._held = held
                return ""
            whole = held.decode("utf-8", "replace")
        self._held = b""
        self._started = self._started or bool(whole)
        return whole

    def flush(self) -> str:
        """Returns what was held back of an incomplete character, when the sequence is ended early."""
        held, self._held = self._held, b""
        return held.decode("utf-8", "replace")


class StopStrings:
    """Watches one sequence's text for stop strings, and holds back what could be the beginning of one."""

    __slots__ = ("_include", "_longest", "_pending", "_seen", "_stops")

    def __init__(self, stops: list[str], *, include: bool) -> None:
        self._stops = stops
        self._include = include
        self._longest = max(map(len, stops))
        self._pending = ""
        self._seen = ""

    def push(self, text: str, *, armed: bool) -> tuple[str, str | None]:
        """Take new text; returns what may be shown now, and the stop string if one was found."""
        window = self._seen + self._pending + text
        shown = len(self._seen)
        if armed:
            ends = [(window.find(stop), stop) for stop in self._stops]
            found = min(((at, stop) for at, stop in ends if at >= 0 and at + len(stop) > shown), default=None)
            if found is not None:
                at, stop = found
                end = at + len(stop) if self._include else at
                return window[shown : max(end, shown)], stop
        keep = 0 if self._include else self._longest - 1
        edge = max(len(window) - keep, shown)
        self._pending = window[edge:]
        self._seen = window[:edge][-self._longest :]
        return window[shown:edge], None

    def flush(self) -> str:
        """Returns what was held back, when the sequence ended for another reason."""
        rest, self._pending = self._pending, ""
        return rest
