"""The boundary where bytes from outside become values, and that no other module decodes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pd_proxy.decoding import (
    UNDECODABLE,
    Undecodable,
    WrongShape,
    bare_json_decoder,
    decode_json,
    decode_python_json,
    decode_text,
    json_decoder,
    msgpack_decoder,
)

ROOT = Path(__file__).parents[1] / "proxy"
DEEP = 100_000


class Point(msgspec.Struct):
    x: int
    name: str = ""


BAD_JSON = {
    "nothing": b"",
    "cut": b'{"x":',
    "no JSON": b"<html>",
    "a byte that is no UTF-8 in a string": b'{"x":1,"name":"caf\xe9"}',
    "a byte that is no UTF-8 in a name": b'{"x":1,"caf\xe9":1}',
    "a lone surrogate": b'{"x":1,"name":"\\ud800"}',
    "deep lists": b'{"x":1,"name":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a number of 5,000 digits": b'{"x":1' + b"0" * 5000 + b"}",
    "a float for an integer": b'{"x":1.5}',
    "another type": b"[]",
    "NaN": b'{"x":NaN}',
    "bytes of UTF-16": '{"x":1}'.encode("utf-16"),
}


@pytest.mark.parametrize("name", [name for name in BAD_JSON if "in a name" not in name])  # of members unread
def test_any_defect_of_json_is_one_error(name: str) -> None:
    with pytest.raises(Undecodable):
        json_decoder(Point)(BAD_JSON[name])


@pytest.mark.parametrize("name", [name for name in BAD_JSON if name not in ("a float for an integer", "another type")])
def test_any_defect_of_json_of_any_type_is_one_error(name: str) -> None:
    with pytest.raises(Undecodable):
        decode_json(BAD_JSON[name])


@pytest.mark.parametrize("name", ["nothing", "cut", "no JSON", "deep lists", "a number of 5,000 digits"])
def test_any_input_that_pythons_json_cannot_read_is_the_same_error(name: str) -> None:
    with pytest.raises(Undecodable):
        decode_python_json(BAD_JSON[name])


def test_text_that_cannot_be_encoded_is_the_same_error() -> None:
    with pytest.raises(Undecodable):
        decode_json("\ud800")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x81\xa1x",
        b"\x82\xa1x\x01\xa4name\xa4caf\xe9",
        b"\x82\xa1x\x01\xa4name" + b"\x91" * DEEP,
        b"\x81\xa1x\xa1y",
        b"\xc1",
    ],
    ids=["nothing", "cut", "a byte that is no UTF-8", "deep", "another type", "no msgpack"],
)
def test_any_defect_of_msgpack_is_one_error(raw: bytes) -> None:
    with pytest.raises(Undecodable):
        msgpack_decoder(Point)(raw)
    with pytest.raises(Undecodable):
        msgpack_decoder(dict[str, int])(raw)


def test_text_is_utf_8_or_the_same_error() -> None:
    assert decode_text(b"caf\xc3\xa9") == "caf\u00e9"
    with pytest.raises(Undecodable):
        decode_text(b"caf\xe9")
    with pytest.raises(Undecodable):
        decode_text(b"caf\xc3\xa9", "ascii")


def test_a_wrong_type_can_be_distinguished_from_invalid_json() -> None:
    with pytest.raises(WrongShape, match=r"Expected `int`, got `str` - at `\$\.x`"):
        json_decoder(Point)(b'{"x":"1"}')
    with pytest.raises(Undecodable, match="truncated") as caught:
        json_decoder(Point)(b'{"x":1')
    assert not isinstance(caught.value, WrongShape)


def test_valid_input_is_decoded() -> None:
    assert json_decoder(Point)(b'{"x":1,"name":"caf\xc3\xa9"}') == Point(1, "caf\u00e9")
    assert msgpack_decoder(Point)(b"\x81\xa1x\x05") == Point(5)
    assert decode_json(b'[1,"a",null]') == [1, "a", None]
    assert decode_python_json(b"[NaN]")[0] != decode_python_json(b"[NaN]")[0]
    assert type(decode_python_json(b"1e400")) is float


# No other module decodes.

DECODERS = {"json.loads", "json.load", "json.JSONDecoder"} | {
    f"msgspec.{form}.{name}" for form in ("json", "msgpack", "yaml", "toml") for name in ("decode", "Decoder")
}
MADE_HERE = {"b64encode", "encode", "generate_latest"}
"""Functions whose bytes are the gateway's own, and certainly ASCII or UTF-8."""
OWN_VOCABULARY = {"pd_proxy_simulator/text.py", "pd_proxy_simulator/tokens.py"}
"""Modules that decode the simulator's own tokens, some of which are no whole character on purpose."""


def decoders(tree: ast.AST, *, text: bool = True) -> Iterator[str]:
    """Each use of a decoder that may raise anything but `Undecodable`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("json", "msgspec", "pickle"):
            names = {alias.name for alias in node.names} & {"load", "loads", "decode", "Decoder", "json", "msgpack"}
            yield from (f"{node.lineno}: from {node.module} import {name}" for name in sorted(names))
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name in DECODERS:
                yield f"{node.lineno}: {name}"
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr == "json" and not node.args:
            yield f"{node.lineno}: {ast.unparse(node)}"
        if text and _decodes_text(node):
            yield f"{node.lineno}: {ast.unparse(node)}"


def _decodes_text(call: ast.Call) -> bool:
    """Whether a call decodes bytes as text, and fails where they are invalid in that encoding."""
    function = call.func
    given: list[Any] = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
    given += [word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)]
    if isinstance(function, ast.Name) and function.id == "str":
        return len(call.args) + len(call.keywords) > 1 and len(given) < 2
    if not isinstance(function, ast.Attribute) or function.attr != "decode":
        return False
    if len(given) < len(call.args) + len(call.keywords):
        return False  # a method of a class in this package, called with values
    source = function.value
    if isinstance(source, ast.Call):
        made = source.func.attr if isinstance(source.func, ast.Attribute) else getattr(source.func, "id", "")
        if made in MADE_HERE:
            return False
    return not given or (given[0] != "latin-1" and len(given) < 2)


def test_no_other_module_calls_a_decoder() -> None:
    wrong = []
    for file in sorted(ROOT.rglob("*.py")):
        name = str(file.relative_to(ROOT))
        if name != "pd_proxy/decoding.py":
            tree = ast.parse(file.read_text(encoding="utf-8"))
            wrong += [f"{name}:{use}" for use in decoders(tree, text=name not in OWN_VOCABULARY)]
    assert wrong == [], "decode with pd_proxy.decoding"


def unguarded(tree: ast.Module) -> Iterator[str]:
    """Each use of a bare decoder outside a `try` that catches everything it may raise."""
    bare = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and "bare_json_decoder(" in ast.unparse(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Try)
        and any(h.type is not None and ast.unparse(h.type) == "UNDECODABLE" for h in node.handlers)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Load)
            and node.id in bare
            and id(node) not in guarded
        ):
            yield f"{node.lineno}: {node.id}"


@pytest.mark.slow
def test_every_use_of_a_bare_decoder_catches_everything_it_raises() -> None:
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(ROOT.rglob("*.py"))}
    assert [f"{file.relative_to(ROOT)}:{use}" for file, tree in trees.items() for use in unguarded(tree)] == []
    source = "read = bare_json_decoder(int)\ntry:\n    read(x)\nexcept {}:\n    pass\n"
    assert list(unguarded(ast.parse(source.format("UNDECODABLE")))) == []
    assert list(unguarded(ast.parse(source.format("Undecodable")))) == ["3: read"]
    assert list(unguarded(ast.parse("reads = {1: bare_json_decoder(int)}\nreads[1](x)"))) == ["2: reads"]


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_bare_decoder_raises_nothing_else(name: str) -> None:
    with pytest.raises(UNDECODABLE):
        bare_json_decoder(dict[str, Point | None])(BAD_JSON[name])


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.loads(x)",
        "import json\nread = json.loads",
        "from json import loads",
        "import msgspec\nmsgspec.json.decode(x)",
        "import msgspec\nread = msgspec.json.Decoder(int).decode",
        "import msgspec\nread = msgspec.msgpack.Decoder()",
        "from msgspec.json import Decoder",
        "from msgspec import json",
        "answer.json()",
        "body.decode()",
        "body.decode('utf-8')",
        "body.decode('ascii')",
        "body.decode(encoding='utf-8')",
        "str(body, 'utf-8')",
    ],
)
def test_the_check_sees_decoders_of_every_form(source: str) -> None:
    assert list(decoders(ast.parse(source))) != []


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.dumps(x)",
        "import msgspec\nmsgspec.json.encode(x)",
        "body.decode('latin-1')",
        "body.decode('utf-8', 'replace')",
        "connector.decode(members, handoff)",
        "b64encode(x).decode()",
        "str(error)",
    ],
)
def test_the_check_accepts_calls_that_cannot_fail(source: str) -> None:
    assert list(decoders(ast.parse(source))) == []
