"""The docs: pages written from the code are up to date, links lead to existing targets, and commands can be run as
printed."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit
from xml.etree import ElementTree

import pytest
from pd_proxy import cli
from pd_proxy.fleet.engine_families import KINDS
from pd_proxy.flow.single_request import ROUTES
from pd_proxy.settings import flags

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", *DOCS]

LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"[A-Z_]+=")


def load_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load_reference()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as links write them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> list[list[str]]:
    """The commands in the README's shell blocks, without the variables before them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = []
    for language, block in CODE_BLOCK.findall(text):
        if language != "sh":
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and ASSIGNMENT.match(words[0]):
                words.pop(0)
            if words:
                found.append(words)
    return found


COMMANDS = commands()


def starting_with(*words: str) -> list[list[str]]:
    return [command for command in COMMANDS if command[: len(words)] == list(words)]


def ids(command: list[str]) -> str:
    return " ".join(command)[:60]


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse commands to the end, settings included, but start nothing."""
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.upper().startswith("PD_PROXY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("pd_proxy.process.serve", lambda settings: 0)
    monkeypatch.setattr("pd_proxy.telemetry.logs.set_up_logging", lambda level, shape: None)
    monkeypatch.setattr("pd_proxy_simulator.command.run", lambda arguments: 0)


@pytest.mark.parametrize("name", ["settings.md", "metrics.md", "errors.md"])
def test_each_generated_page_is_up_to_date_with_the_code(name: str) -> None:
    text = reference.pages()[name]
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, "run: python docs/reference.py"


def test_check_names_the_page_that_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "HERE", tmp_path)
    assert reference.main(["--check"]) == 1
    assert not list(tmp_path.iterdir())
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0
    capsys.readouterr()
    (tmp_path / "metrics.md").write_text("old")
    assert reference.main(["--check"]) == 1
    assert capsys.readouterr().err == "docs/metrics.md is stale; run: python docs/reference.py\n"


def test_pages_do_not_change_with_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = reference.pages()
    monkeypatch.setenv("PD_PROXY_PORT", "1234")
    monkeypatch.setenv("PD_PROXY_PREFILL", "http://somewhere:1")
    assert reference.pages() == before


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_points_to_something_that_exists(page: Path) -> None:
    broken = []
    for link in LINK.findall(CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = page.parent / parts.path if parts.path else page
        if not target.exists() or (parts.fragment and parts.fragment not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_page_begins_with_its_readers(page: Path) -> None:
    text = re.sub(r"\A<!--.*?-->\s*", "", page.read_text(encoding="utf-8"))
    title, paragraph = text.split("\n\n")[:2]
    assert title.startswith("# ")
    assert paragraph.startswith("For "), f"{page.name} begins with {paragraph[:60]!r}"


def test_every_decision_is_in_the_list_and_at_most_a_page() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = set(LINK.findall((folder / "README.md").read_text(encoding="utf-8")))
    pages = {page.name for page in folder.glob("*.md")} - {"README.md"}
    assert listed == pages
    for name in pages:
        text = (folder / name).read_text(encoding="utf-8")
        assert len(text.split()) < 400, name
        assert [part for part in ("**Decision.**", "**Why.**", "**What it costs.**") if part not in text] == []


def test_the_readme_shows_commands_of_every_kind() -> None:
    for words in (("make",), ("pd-proxy", "serve"), ("pd-proxy", "check"), ("pd-proxy", "simulate"), ("docker", "run")):
        assert starting_with(*words), words


def test_every_command_starts_with_a_known_program() -> None:
    assert {command[0] for command in COMMANDS} <= {"make", "pd-proxy", "docker", "curl"}


@pytest.mark.parametrize("command", starting_with("make"), ids=ids)
def test_make_targets_are_in_the_makefile(command: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [word for word in command[1:] if "=" not in word]
    assert targets
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("command", starting_with("pd-proxy"), ids=ids)
def test_pd_proxy_commands_parse_and_their_settings_are_valid(command: list[str], nothing_runs: None) -> None:
    assert cli.main(command[1:]) == 0


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "README.md"], ids=lambda page: page.name)
def test_pd_proxy_commands_of_every_page_parse(page: Path) -> None:
    text = "\n".join(
        block for language, block in CODE_BLOCK.findall(page.read_text(encoding="utf-8")) if language == "sh"
    )
    for line in re.findall(r"^(?:[A-Z_]+=\S+ )*pd-proxy (.+)", text.replace("\\\n", " "), re.MULTILINE):
        words = shlex.split(re.split(r" (?:2?>|\||&)", line)[0], comments=True)
        assert flags.in_kebab_case(words) == words, "flags are written with hyphens"
        assert cli._parse(words).run


@pytest.mark.parametrize("command", starting_with("docker", "run"), ids=ids)
def test_arguments_after_the_image_are_flags_of_serve(command: list[str], nothing_runs: None) -> None:
    mounts = [word.split(":") for before, word in pairwise(command) if before == "-v"]
    inside = {target: source for source, target, *_ in mounts}
    given = [inside.get(word, word) for word in command[command.index("pd-proxy") + 1 :]]
    assert cli.main(["serve", *given]) == 0


@pytest.mark.parametrize("command", starting_with("docker"), ids=ids)
def test_docker_commands_name_files_that_exist(command: list[str]) -> None:
    if command[1] == "build":
        assert (ROOT / "Dockerfile").exists()
    for before, word in pairwise(command):
        if before in ("-f", "-v"):
            assert (ROOT / word.partition(":")[0]).exists()


def test_the_readme_has_a_place_for_the_figures() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- figures -->") == text.count("<!-- /figures -->") == 1
    assert text.index("<!-- figures -->") < text.index("<!-- /figures -->")


def test_the_picture_of_states_is_up_to_date_with_the_tables() -> None:
    done = subprocess.run([sys.executable, "docs/states.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["walk.svg", "placement.svg", "states.svg"])
def test_a_picture_is_well_formed_and_loads_nothing(name: str) -> None:
    picture = (ROOT / "docs" / name).read_text(encoding="utf-8")
    root = ElementTree.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in picture
    assert not re.search(r"https?://", picture.replace("http://www.w3.org/2000/svg", ""))
    assert "@import" not in picture


def test_the_page_of_routes_has_each_with_its_pools_and_kinds() -> None:
    text = (ROOT / "docs" / "routes.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `POST (/[^`]+)` \| (?:one|prefill, decode) \| ([^|]+\|[^|]+) \|", text, re.MULTILINE))
    assert rows.keys() >= ROUTES.keys()
    for path, row in rows.items():
        pools, kinds = (cell.strip() for cell in row.split("|"))
        assert kinds == ", ".join(f"`{kind.name}`" for kind in KINDS.values() if path in kind.routes), path
        if path in ROUTES:
            assert pools == ", ".join(ROUTES[path].roles), path
    health = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| `(/[^`]+)`", text, re.MULTILINE))
    assert health == {name: kind.health for name, kind in KINDS.items()}
