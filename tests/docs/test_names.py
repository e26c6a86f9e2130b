"""The files, packages, classes and functions that docs/architecture.md and docs/contributing.md name exist."""

from __future__ import annotations

import ast
import keyword
import re
from functools import cache
from pathlib import Path

import pytest
from pd_proxy import errors
from pd_proxy.telemetry.old_names import OLD_NAMES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "proxy" / "pd_proxy"
PAGES = ("architecture.md", "contributing.md")
CODE = re.compile(r"`([^`\n]+)`")
CODE_BLOCK = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"[\w./@-]+(\.(py|md|toml|yaml)|/)")
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@cache
def identifiers() -> frozenset[str]:
    """Every identifier in the sources, and every string that could be one: codes of errors, names of connectors."""
    found: set[str] = set()
    for file in (ROOT / "proxy").rglob("*.py"):
        found.update((file.stem, file.parent.name))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    found.add(name)
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                    found.add(name)
                case ast.alias(name=name):
                    found.update(name.split("."))
                case ast.keyword(arg=str(name)):
                    found.add(name)
                case ast.Constant(value=str(text)) if text.isidentifier():
                    found.add(text)
    return frozenset(found)


@cache
def files() -> frozenset[str]:
    """The name of every source file; pages name a file of a package by its name alone."""
    return frozenset(file.name for file in (ROOT / "proxy").rglob("*.py"))


def exists(word: str) -> bool:
    """Whether a page's word in backticks is in the repository; True for a word that is no name, such as a command."""
    if FILE.fullmatch(word):
        return word in files() or any((base / word).exists() for base in (ROOT, PACKAGE, ROOT / "proxy", ROOT / "docs"))
    if NAME.fullmatch(word):
        return all(part in identifiers() or keyword.iskeyword(part) for part in word.split("."))
    return True


@pytest.mark.parametrize("page", PAGES)
def test_every_file_class_and_function_that_the_page_names_exists(page: str) -> None:
    text = CODE_BLOCK.sub("", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    words = CODE.findall(text)
    assert len(words) > 20
    assert sorted({word for word in words if not exists(word)}) == []


@pytest.mark.parametrize("word", ["PendingHandoff", "Connector.negotiate", "flow/legs.py", "registry.py", "handoff/"])
def test_a_name_of_the_sources_is_found(word: str) -> None:
    assert exists(word)


@pytest.mark.parametrize(
    "word", ["NoSuchClass", "Connector.no_such_function", "flow/no_such_file.py", "no_such_folder/"]
)
def test_a_name_that_is_not_in_the_sources_is_reported(word: str) -> None:
    assert not exists(word)


@pytest.mark.parametrize("new", OLD_NAMES)
def test_the_changelog_has_every_renamed_metric(new: str) -> None:
    old = OLD_NAMES[new]
    rows = [
        line for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if f"| `{old.name}" in line
    ]
    assert len(rows) == 1
    before, after = rows[0].strip(" |").split(" | ")
    assert re.match(rf"`{old.name}(_total)?[{{`]", before)
    assert re.match(rf"`{new}(_total)?[{{`]", after)
    assert [word for word in (*old.labels.values(), *old.values.values()) if word not in before] == []
    assert [word for word in (*old.labels, *old.values) if word not in after] == []


def test_the_tree_of_errors_has_every_class_below_its_base() -> None:
    rows = re.findall(r"^ {4}([ \u2502\u251c\u2514\u2500]*)(\w+)", errors.__doc__ or "", re.MULTILINE)
    path: list[str] = []
    tree = []
    for indent, name in rows:
        path[len(indent) // 4 :] = [name]
        tree.append((name, path[-2] if len(path) > 1 else "Exception"))
    classes, found = [errors.GatewayError], set()
    while classes:
        kind = classes.pop()
        found.add((kind.__name__, kind.__base__.__name__ if kind.__base__ else ""))
        classes += kind.__subclasses__()
    assert len(tree) == len(set(tree))
    assert set(tree) == found
