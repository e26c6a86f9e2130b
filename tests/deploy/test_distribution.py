"""The content of the distributions: a wheel can run, and a source distribution can be tested."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest
from pd_proxy import __version__

ROOT = Path(__file__).resolve().parents[2]
SIMULATOR = ROOT / "proxy" / "pd_proxy_simulator"
SECONDS = 60.0


def project_in(folder: Path) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())
    return project


@pytest.mark.parametrize("folder", [ROOT, SIMULATOR], ids=["gateway", "simulator"])
def test_the_project_says_what_it_needs_to_be_built_and_what_it_is(folder: Path) -> None:
    project = project_in(folder)
    assert project["build-system"]["requires"] == ["setuptools>=77"]
    assert project["project"]["version"] == __version__
    assert "Typing :: Typed" in project["project"]["classifiers"]
    assert not [name for name in project["project"]["classifiers"] if name.startswith("License ::")]
    (package,) = project["tool"]["setuptools"]["package-data"]
    assert (ROOT / "proxy" / package / "py.typed").exists()


def test_the_simulator_is_a_distribution_beside_the_gateways_of_the_same_version_and_with_the_same_bounds() -> None:
    gateway, simulator = project_in(ROOT)["project"], project_in(SIMULATOR)["project"]
    assert f"pd-proxy=={__version__}" in simulator["dependencies"]
    assert set(simulator["dependencies"]) - {f"pd-proxy=={__version__}"} <= set(gateway["dependencies"])
    assert simulator["optional-dependencies"]["zmq"] == gateway["optional-dependencies"]["zmq"]
    assert simulator["requires-python"] == gateway["requires-python"]
    packages = {".".join(file.parent.relative_to(SIMULATOR.parent).parts) for file in SIMULATOR.rglob("*.py")}
    assert set(project_in(SIMULATOR)["tool"]["setuptools"]["packages"]) == packages


def test_a_gateway_without_the_simulator_names_what_to_install() -> None:
    program = (
        "import sys; sys.modules['pd_proxy_simulator'] = None; from pd_proxy.cli import main; "
        "sys.exit(main(['simulate', '--role', 'prefill']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"pd-proxy simulate: error: the simulated engine is not installed: install pd-proxy-simulator {__version__} "
        "(in a checkout: pip install ./proxy/pd_proxy_simulator)"
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files of the checkout, since building leaves files behind."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("this is no checkout")
    folder = tmp_path_factory.mktemp("source")
    for name in listed.stdout.split("\n")[:-1]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def build(kind: str, folder: Path, target: Path) -> Path:
    """Build an "sdist" or a "wheel" of the project in a folder."""
    program = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    command = [sys.executable, "-P", "-c", program, target]  # -P: a module of the folder must not hide another
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source_distribution(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheels(source_distribution: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The gateway's wheel, made from its source distribution, and the simulator's."""
    folder = tmp_path_factory.mktemp("wheels")
    shutil.unpack_archive(source_distribution, folder)
    unpacked = folder / source_distribution.name.removesuffix(".tar.gz")
    return [build("wheel", part, folder) for part in (unpacked, unpacked / "proxy" / "pd_proxy_simulator")]


@pytest.mark.slow
def test_the_source_distribution_holds_every_file_of_the_checkout(source_distribution: Path, source: Path) -> None:
    with tarfile.open(source_distribution) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()} - held == set()


@pytest.mark.slow
def test_each_wheel_holds_its_own_package_and_nothing_else(wheels: list[Path]) -> None:
    for wheel, package in zip(wheels, ("pd_proxy", "pd_proxy_simulator"), strict=True):
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
        assert {name.partition("/")[0] for name in names} == {package, f"{package}-{__version__}.dist-info"}
        others = {name for name in names if name.startswith(f"{package}/") and not name.endswith(".py")}
        assert others == {f"{package}/py.typed", *(["pd_proxy/pd-proxy.yaml"] if package == "pd_proxy" else [])}
        sources = {str(file.relative_to(ROOT / "proxy")) for file in (ROOT / "proxy" / package).rglob("*.py")}
        assert {name for name in names if name.endswith(".py")} == sources


@contextmanager
def listening(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Run a server until the end of the block; yields the URL at which it says it listens."""
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield next(found[1] for line in process.stdout if (found := re.search(r"listening on (http://\S+)", line)))
        finally:
            process.terminate()
            process.communicate(timeout=SECONDS)


@pytest.mark.slow
def test_the_wheels_work_in_an_environment_of_their_own_even_beside_the_project_proxy_py(
    wheels: list[Path], tmp_path: Path
) -> None:
    """`proxy.py` of PyPI installs a package `proxy`; a file in both projects would be overwritten without notice."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    program = str(environment / "bin" / "pd-proxy")
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    clean |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_"))}

    def install(*what: str | Path) -> None:
        pip = [environment / "bin" / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *what]
        done = subprocess.run(pip, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *arguments], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=SECONDS
        )

    install(wheels[0], "proxy.py")
    site = next((environment / "lib").glob("python3*")) / "site-packages"
    owners: dict[str, set[str]] = {}
    for record in site.glob("*.dist-info/RECORD"):
        for line in record.read_text().splitlines():
            owners.setdefault(line.partition(",")[0], set()).add(record.parent.name)
    assert {path: names for path, names in owners.items() if len(names) > 1} == {}

    (tmp_path / "pd-proxy.yaml").write_text("mixed: [http://127.0.0.1:1]\n")
    checked = run("check", "pd-proxy.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"install pd-proxy-simulator {__version__}" in run("simulate").stderr

    install(wheels[1])
    with (
        listening([program, "simulate", "--port", "0"], tmp_path, clean) as engine,
        listening([program, "serve", "--port", "0", "--mixed", engine], tmp_path, clean) as url,
        httpx.Client(base_url=url, trust_env=False, verify=False, timeout=SECONDS) as client,
    ):
        deadline = monotonic() + SECONDS
        while client.get("/ready").status_code != 200:
            assert monotonic() < deadline
        answer = client.post("/v1/completions", json={"model": "sim", "prompt": "Hello", "max_tokens": 3})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 3
