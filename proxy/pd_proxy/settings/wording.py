"""Describes what is wrong with a value, in plain words instead of pydantic's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_WITH_UNIT = re.compile(r"\d+(\.\d+)?\s*(ms|s|secs?|seconds?|m|min|minutes?|h|hours?|[kKmMgG]i?[bB]?)")
_WHAT = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping of names to values",
    "model": "a group of settings, a mapping of names to values",
}
_QUOTE = "'"
_BOUNDS = {
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
}


def wording(kind: str, given: Any, context: Mapping[str, Any], message: str, *, secret: bool) -> str:
    """Describe an error in one clause.

    Arguments:
        kind, context, message: pydantic's type, context and message of the error.
        given: the value.
        secret: whether the value must not be shown.
    """
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if given is None:
        return "has no value; leave the line out to have the default"
    not_this = "" if secret else f", not {_shown(given)}"
    if kind in _BOUNDS:
        return f"must be {_BOUNDS[kind].format(**{name: _number(bound) for name, bound in context.items()})}{not_this}"
    if kind == "literal_error":
        return f"must be {str(context.get('expected', '')).replace(_QUOTE, '')}{not_this}"
    if kind == "string_pattern_mismatch":
        return f"must be letters, digits and ._-, at most 64, the first of them a letter or a digit{not_this}"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "string_too_long":
        return f"must have at most {context.get('max_length')} characters"
    what = _WHAT.get(kind.partition("_")[0])
    if what is None:
        return f"{message[:1].lower()}{message[1:]}"
    hint = ""
    if what == "text" and isinstance(given, int | float):
        hint = "; put it in quotes"
    elif what in ("a number", "a whole number") and isinstance(given, str) and _WITH_UNIT.fullmatch(given.strip()):
        hint = " (without a unit)"
    return f"must be {what}{not_this}{hint}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    if value == "":
        return "empty text"
    text = repr(value) if isinstance(value, str | int | float) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _number(bound: Any) -> str:
    return (
        f"{bound:g}"
        if isinstance(bound, float) and bound < 1e6
        else f"{bound:.0f}"
        if isinstance(bound, float)
        else str(bound)
    )
