"""What the real tests share: one pair of engines, a second decode engine, the single engine's answers, and a gateway
in front of the pair."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from . import processes
from .bed import Bed, connect
from .engines import Engine, Role, running
from .gateway import Gateway, serving
from .questions import ALL_QUESTIONS

if TYPE_CHECKING:
    from openai import OpenAI

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / os.environ.get("REAL_VENV", ".venv-vllm")
"""The environment that `make test-real REAL_VENV=...` names: several checkouts can share one, which takes 2.3 GB."""
VENV_PYTHON = VENV / "bin" / "python"
MODEL = ROOT / ".cache" / "tiny-model"
KILLERS = {
    "restarts_second_decode": "stops the shared second decode engine and starts it again",
    "kills_second_decode": "ends the shared second decode engine",
    "kills_prefill": "ends the shared prefill engine",
}
"""Marks of the tests that end an engine which all tests share, in the order in which they run, with their effect."""
QUESTIONS_AT_ONCE = 8


def pytest_configure(config: pytest.Config) -> None:
    for mark, deed in KILLERS.items():
        config.addinivalue_line("markers", f"{mark}: {deed}, so runs after all that need it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A start takes a minute, so the tests that kill an engine run last instead of having one of their own."""
    items.sort(key=lambda item: [item.get_closest_marker(mark) is not None for mark in reversed(list(KILLERS))])


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
        reason = f"no {VENV_PYTHON}: run `bash tests/real/install.sh {VENV}`, or `make test-real`"
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
def bed(request: pytest.FixtureRequest, venv_python: Path, model: Path, logs: Path) -> Iterator[Bed]:
    """Start all engines at once; the single one answers every question for comparison, and is then stopped."""
    # SIGTERM (a job cancelled, `timeout`) must unwind the fixtures as Ctrl-C does, or the engines outlive pytest.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    roles = [Role.PREFILL, Role.DECODE, Role.SINGLE]
    if any("second_decode" in getattr(item, "fixturenames", ()) for item in request.session.items):
        roles.append(Role.DECODE)
    # Only the last one can be paused and put to sleep, so that the gateway is tested with both kinds.
    dev_mode = range(3, len(roles))
    with running(venv_python, model, roles, logs, dev_mode=dev_mode) as (prefill, decode, single, *others):
        with ThreadPoolExecutor(QUESTIONS_AT_ONCE) as pool:
            answers = dict(zip(ALL_QUESTIONS, pool.map(lambda one: one.ask(single.url)[0], ALL_QUESTIONS), strict=True))
        single.group.stop(seconds=5)  # its polling on two cores would disturb the others' timing
        second = others[0] if others else None
        for engine in (decode, *others):
            connect(prefill, engine)
        yield Bed(prefill, decode, second, answers)


@pytest.fixture(scope="session")
def second_decode(bed: Bed) -> Engine:
    """The other decode engine; it is started only where a test requests it."""
    assert bed.second_decode is not None
    return bed.second_decode


@pytest.fixture(scope="session")
def gateway(bed: Bed, logs: Path) -> Iterator[Gateway]:
    with serving(bed.prefill.url, bed.decode.url, logs / "gateway.log") as started:
        yield started


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[OpenAI]:
    """The official client of the gateway, without retries."""
    from openai import OpenAI

    with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=60) as opened:
        yield opened
