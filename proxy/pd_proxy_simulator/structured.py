"""Answers that must be JSON: tool calls, `response_format` and `structured_outputs`.

The engine writes such an answer from a script, which is a pure function of the prompt's KV and of the schema.
Invariant:
a script that was not cut short by `max_tokens` is valid for its schema (the common keywords of JSON Schema).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pd_proxy_simulator.tokens import GENERATED, mix, token_text

_DEEPEST = 6


@dataclass(frozen=True, slots=True)
class Structure:
    """The structure of the answer: a JSON schema, one of some texts, or a tool call."""

    schema: Any = None
    choices: tuple[str, ...] = ()
    tool: str | None = None
    listed: bool = False  # tool_choice "required": the model writes a list of calls, not bare arguments


@dataclass(frozen=True, slots=True)
class Script:
    """The whole text, and the position of a tool call's arguments in it."""

    text: str
    start: int
    end: int


def write_script(structure: Structure, state: int) -> Script:
    """The text with which a sequence in `state` answers."""
    if structure.choices:
        text = structure.choices[mix(state) % len(structure.choices)]
        return Script(text, 0, len(text))
    arguments = json.dumps(_value(structure.schema, structure.schema, state, 0), ensure_ascii=False)
    if not structure.listed:
        return Script(arguments, 0, len(arguments))
    head = f'[{{"name": {json.dumps(structure.tool)}, "parameters": '
    return Script(head + arguments + "}]", len(head), len(head) + len(arguments))


def _word(state: int) -> str:
    return token_text(GENERATED[mix(state) % 200]).strip()


def _value(schema: Any, root: Any, state: int, depth: int) -> Any:
    state = mix(state + depth + 1)
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return _word(state)
    if "$ref" in schema:
        return _value(_referred(root, schema["$ref"]), root, state, depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][state % len(schema["enum"])]
    for union in ("anyOf", "oneOf", "allOf"):
        if schema.get(union):
            return _value(schema[union][0], root, state, depth + 1)
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0] if kind else "string"
    if kind == "object" or (kind is None and "properties" in schema):
        parts = enumerate(_parts(schema))
        return {name: _value(part, root, mix(state ^ index), depth + 1) for index, (name, part) in parts}
    if kind == "array":
        count = min(max(int(schema.get("minItems", 1)), 1), 100)
        return [_value(schema.get("items"), root, state + index, depth + 1) for index in range(count)]
    if kind in ("integer", "number"):
        low = int(schema.get("minimum", 0))
        return low + state % max(int(schema.get("maximum", low + 99)) - low + 1, 1)
    if kind == "boolean":
        return bool(state & 1)
    if kind == "null":
        return None
    text = " ".join(_word(state + index) for index in range(1 + state % 4))
    return text.ljust(int(schema.get("minLength", 0)), "x")[: int(schema.get("maxLength", 1000))]


def _referred(root: Any, pointer: str) -> Any:
    found = root
    for name in pointer.removeprefix("#").strip("/").split("/"):
        found = found[name] if name else found
    return found


def _parts(schema: dict[str, Any]) -> list[tuple[str, Any]]:
    properties = schema.get("properties")
    if not isinstance(properties, dict) or not properties:
        return [("answer", {"type": "string"})]
    return list(properties.items())
