"""The structure that an answer must have: a call of a certain tool, or a schema.

Invariant: a structure that leaves this module can be written in any state; one that cannot is refused with 400.
"""

from __future__ import annotations

from typing import Any

from pd_proxy.decoding import decode_python_json

from pd_proxy_simulator.errors import bad_request, invalid_field
from pd_proxy_simulator.fields import ChatFields, CommonFields, Object
from pd_proxy_simulator.structured import Structure, write_script


def _checked(structure: Structure) -> Structure:
    """Write a script once: a schema that cannot be followed is refused here, not in the middle of a step."""
    try:
        write_script(structure, 0)
    except (ArithmeticError, KeyError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise bad_request(f"Invalid grammar specification: {error!r}", "structured_outputs") from error
    return structure


def tool_structure(fields: ChatFields, tool: str, *, listed: bool) -> Structure:
    """The structure of a call of `tool`."""
    return _checked(Structure(schema=_tool_schema(fields, tool), tool=tool, listed=listed))


def wanted_structure(fields: CommonFields) -> Structure | None:
    """The structure that `structured_outputs` or `response_format` ask for."""
    wanted = fields.structured_outputs
    if wanted is not None:
        if wanted.get("choice"):
            return _checked(Structure(choices=tuple(map(str, wanted["choice"]))))
        if wanted.get("json") is not None:
            schema = wanted["json"]
            try:
                schema = decode_python_json(schema) if isinstance(schema, str) else schema
            except ValueError as error:
                raise bad_request(f"Invalid grammar specification: {error}", "structured_outputs") from error
            return _checked(Structure(schema=schema))
        if wanted.get("json_object"):
            return Structure(schema={"type": "object"})
    form = fields.response_format
    if form is None:
        return None
    match form.get("type"):
        case "json_object":
            return Structure(schema={"type": "object"})
        case "json_schema":
            described = form.get("json_schema")
            if not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
                message = "When response_format type is 'json_schema', the 'json_schema' field must be provided."
                raise bad_request(message, "response_format")
            return _checked(Structure(schema=described["schema"]))
        case "text":
            return None
    raise invalid_field("response_format", "literal_error", "Input should be text, json_object or json_schema", form)


def _name(tool: Object) -> str:
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise invalid_field("tools", "missing", "Field required", tool)
    return name


def wanted_tool(fields: ChatFields) -> tuple[str | None, bool]:
    """The tool that has to be called, and whether the model chose it."""
    names = [_name(tool) for tool in fields.tools or ()]
    choice = fields.tool_choice
    if choice is None or choice in ("none", "auto"):
        if choice == "auto" and not names:
            raise bad_request("When using `tool_choice`, `tools` must be set.", "tool_choice")
        return None, False
    if not names:
        raise bad_request("When using `tool_choice`, `tools` must be set.", "tool_choice")
    if choice == "required":
        seen = sum(len(str(message.get("content"))) for message in fields.messages or ())
        return names[seen % len(names)], True
    if isinstance(choice, dict):
        name = _name(choice)
        if name not in names:
            message = "The tool specified in `tool_choice` does not match any of the specified `tools`"
            raise bad_request(message, "tool_choice")
        return name, False
    raise bad_request(f"Invalid value for `tool_choice`: {choice}! Only named tools, 'none', 'auto' or 'required'.")


def _tool_schema(fields: ChatFields, name: str) -> Any:
    for tool in fields.tools or ():
        if _name(tool) == name:
            return tool["function"].get("parameters") or {"type": "object"}
    return {"type": "object"}
