"""What the real tests share: one pair of engines, the single engine's answers, and a gateway in front of the pair."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from . import processes
from .bed import Bed, connect
from .engines import Role, running
from .gateway import Gateway, serving
from .questions import ALL_QUESTIONS

ROOT = Path(__file__).resolve().parents[2]
VENV_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
MODEL = ROOT / ".cache" / "tiny-model"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kills_prefill: ends the shared prefill engine, so it runs after all others")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A start takes a minute: rather than give the tests that kill prefill an engine of their own, run them last."""
    items.sort(key=lambda item: item.get_closest_marker("kills_prefill") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Name the logs under a failed test."""
    report = yield
    if report.failed and processes.LOGS:
        report.sections.append(("logs of engines and gateways", "\n".join(map(str, processes.LOGS))))
    return report


@pytest.fixture(scope="session")
def venv_python() -> Path:
    """Python of the virtual environment that holds vLLM; without one, skip, or fail where REQUIRE_REAL_VLLM is set."""
    if not VENV_PYTHON.exists():
        reason = f"no {VENV_PYTHON.relative_to(ROOT)}: run `bash tests/real/install.sh .venv-vllm`, or `make test-real`"
        if os.environ.get("REQUIRE_REAL_VLLM"):
            pytest.fail(reason)
        pytest.skip(reason)
    return VENV_PYTHON


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def model(venv_python: Path) -> Path:
    subprocess.run([venv_python, Path(__file__).with_name("tiny_model.py"), MODEL], check=True, timeout=120)
    return MODEL


@pytest.fixture(scope="session")
def bed(venv_python: Path, model: Path, logs: Path) -> Iterator[Bed]:
    """Three engines started at once; the single one answers everything it will be compared by, and is ended."""
    # SIGTERM (a job cancelled, `timeout`) must unwind the fixtures as Ctrl-C does, or the engines outlive pytest.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with running(venv_python, model, [Role.PREFILL, Role.DECODE, Role.SINGLE], logs) as (prefill, decode, single):
        answers = {question: question.ask(single.url)[0] for question in ALL_QUESTIONS}
        single.group.stop(seconds=5)  # three engines' polling on two cores would disturb the pair's timing
        connect(prefill, decode)
        yield Bed(prefill, decode, answers)


@pytest.fixture(scope="session")
def gateway(bed: Bed, logs: Path) -> Iterator[Gateway]:
    with serving(bed.prefill.url, bed.decode.url, logs / "gateway.log") as started:
        yield started
