"""The table of packages in docs/architecture.md, and the packages without I/O."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "proxy" / "pd_proxy"
SIMULATOR = ROOT.parent / "pd_proxy_simulator"

REPOSITORY = ROOT.parents[1]
PAGE = REPOSITORY / "docs" / "architecture.md"


def the_table() -> dict[str, set[str]]:
    """Package -> the packages it may import besides itself and the common ones, from the table of
    docs/architecture.md."""
    section = PAGE.read_text(encoding="utf-8").partition("## Packages\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    return {row[0].strip("`"): set(re.findall(r"`([a-z_.]+)`", row[2])) for row in rows[2:]}


MAY_IMPORT = the_table()
MOST_LINES = 450
"""The longest that a file of proxy/ may be."""
MOST_LINES_OF_A_FUNCTION = 50
FORBIDDEN_WITHOUT_IO = {
    *("asyncio", "socket", "ssl", "select", "threading", "subprocess", "time", "datetime", "random", "secrets", "uuid"),
    *("os", "pathlib", "io", "logging", "httpx", "httptools", "uvicorn", "fastapi", "starlette"),
}


@dataclass(frozen=True)
class Facts:
    """What the tests here need to know of one file, from one pass over its syntax tree.

    Attributes:
        imports: line and full name of every module that it imports, wherever in it.
        attributes: every name after a dot.
        longest: the lines of its longest function, from `def` to its last line.
    """

    imports: list[tuple[int, str]]
    attributes: frozenset[str]
    longest: int


@cache
def facts(file: Path) -> Facts:
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return Facts(
        list(_imports(file, nodes)),
        frozenset(node.attr for node in nodes if isinstance(node, ast.Attribute)),
        max((node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno), default=0),
    )


def imports(file: Path) -> list[tuple[int, str]]:
    return facts(file).imports


def _imports(file: Path, nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = file.relative_to(ROOT.parent).parts[: -node.level]
                base = ".".join([*package, *filter(None, [base])])
            # `from pd_proxy.fleet import backend` imports a module, `from pd_proxy import __version__` its package.
            names = {f"{base}.{alias.name}" for alias in node.names}
            modules = {name for name in names if base.startswith("pd_proxy") and _is_module(name)}
            yield from ((node.lineno, name) for name in sorted(modules))
            if names - modules:
                yield node.lineno, base


def _is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def package_of(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").parts[0]


FILES = sorted(ROOT.rglob("*.py"))


def test_every_file_is_in_a_package_of_the_table() -> None:
    assert {package_of(file) for file in FILES} == MAY_IMPORT.keys() | {"__init__"}


@pytest.mark.parametrize("here", sorted(MAY_IMPORT))
def test_a_package_imports_only_what_the_table_allows(here: str) -> None:
    allowed = {f"pd_proxy.{name}" for name in MAY_IMPORT[here] | {here, "decoding", "encoding", "transitions"}}
    wrong = [
        f"{file.relative_to(ROOT.parent)}:{line} imports {name}"
        for file in FILES
        if package_of(file) == here
        for line, name in imports(file)
        if name.startswith("pd_proxy.") and not any(name == good or name.startswith(f"{good}.") for good in allowed)
    ]
    assert wrong == []


@pytest.mark.parametrize("name", ["handoff", "placement", "prefix", "requests"])
def test_packages_without_io_import_nothing_that_has_io(name: str) -> None:
    files = [file for file in FILES if package_of(file) == name]
    assert len(files) > 2
    wrong = [
        f"{file.relative_to(ROOT.parent)}:{line} imports {module}"
        for file in files
        for line, module in imports(file)
        if module.split(".")[0] in FORBIDDEN_WITHOUT_IO
    ]
    assert wrong == []


def test_only_the_clients_of_legs_and_of_the_control_plane_send_requests_to_engines() -> None:
    """Each of these clients bounds what an engine can cost: in time, in bytes, without inflating, without redirects."""
    clients = {"httpx", "aiohttp", "requests", "urllib3", "urllib.request", "http.client", "httpcore"}
    files = [file for file in FILES if file.stem != "container_health"]  # it asks the gateway
    found = {
        (str(file.relative_to(ROOT)), module)
        for file in files
        for _, module in imports(file)
        if module in clients or module.split(".")[0] in clients
    }
    assert found == {("http/control.py", "httpx")}
    connecting = {
        "create_connection",
        "create_unix_connection",
        "open_connection",
        "open_unix_connection",
        "sock_connect",
    }
    found = {str(file.relative_to(ROOT)) for file in files if facts(file).attributes & connecting}
    assert found == {"http/address.py"}
    parsing = {
        str(file.relative_to(ROOT)) for file in files if "HttpResponseParser" in file.read_text(encoding="utf-8")
    }
    assert parsing == {"http/connection.py"}


def test_the_simulator_shares_nothing_with_the_gateway_but_the_decoder() -> None:
    files = sorted(SIMULATOR.rglob("*.py"))
    assert files
    shared = {name for file in files for _, name in imports(file) if name.split(".")[0] == "pd_proxy"}
    assert shared <= {"pd_proxy.decoding"}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for type checkers alone count too, since a reader follows them as well."""
    files = [*FILES, *SIMULATOR.rglob("*.py")]
    names = {
        ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): file for file in files
    }
    graph = {name: {module for _, module in imports(file) if module in names} - {name} for name, file in names.items()}
    reached = {name: reachable(graph, name) for name in graph}
    circles = {name for name, its in reached.items() if name in its}
    assert not circles


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """The modules that one leads to by imports, including itself where they lead back to it."""
    found: set[str] = set()
    ahead = set(graph[start])
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead |= graph[name]
    return found


def test_no_file_is_longer_than_the_limit() -> None:
    files = sorted(ROOT.parent.rglob("*.py"))
    lengths = {path_in_proxy(file): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert lengths
    assert {file: lines for file, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_function_is_longer_than_the_limit() -> None:
    lengths = {path_in_proxy(file): facts(file).longest for file in sorted(ROOT.parent.rglob("*.py"))}
    assert {file: lines for file, lines in lengths.items() if lines > MOST_LINES_OF_A_FUNCTION} == {}


def path_in_proxy(file: Path) -> str:
    return str(file.relative_to(ROOT.parent))


def test_no_rule_about_functions_is_ignored_in_a_file_that_keeps_it() -> None:
    """pyproject.toml names the files with functions that are too complex or too long; ruff tells here which
    functions are."""
    ruff = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    limits = [
        f"lint.mccabe.max-complexity={ruff['mccabe']['max-complexity']}",
        f"lint.pylint.max-statements={ruff['pylint']['max-statements']}",
    ]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "C901,PLR0915,PLR1704", "proxy"]
    command += ["--output-format", "json", *(word for limit in limits for word in ("--config", limit))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    found: dict[str, set[str]] = {}
    for finding in json.loads(done.stdout):
        found.setdefault(str(Path(finding["filename"]).relative_to(REPOSITORY)), set()).add(finding["code"])
    ignored = {file: set(rules) for file, rules in ruff["per-file-ignores"].items() if file.startswith("proxy/")}
    assert ignored == found


def test_outside_telemetry_only_its_records_are_imported() -> None:
    wrong = [
        f"{file.relative_to(ROOT.parent)}:{line} imports {module}"
        for file in FILES
        if package_of(file) not in {"telemetry", "assembly", "cli", "workers"}
        for line, module in imports(file)
        if module.startswith("pd_proxy.telemetry.") and not module.startswith("pd_proxy.telemetry.records")
    ]
    assert wrong == []


def test_the_check_sees_imports_of_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room_ = tmp_path / "pd_proxy" / "handoff"
    room_.mkdir(parents=True)
    (tmp_path / "pd_proxy" / "fleet").mkdir()
    (tmp_path / "pd_proxy" / "app.py").touch()
    file = room_ / "x.py"
    file.write_text(
        "import asyncio, pd_proxy.fleet\nfrom pd_proxy import app\nfrom ..fleet import backend\nfrom . import y\n"
        "def f():\n    from time import sleep\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path / "pd_proxy")
    assert {name for _, name in imports(file)} >= {
        "asyncio",
        "pd_proxy.fleet",
        "pd_proxy.app",
        "pd_proxy.handoff",
        "time",
    }
