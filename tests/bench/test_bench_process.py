"""Processes of the bench are reliably ended, and their resource use is read correctly."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import process
from bench.cases import Case
from bench.cost import Contender, measure
from bench.process import BenchError, cpu_seconds, end_group, free_port, rss_mib, running, tree, wait_ready

BURN_S = 0.2
BURN = f"import time\nwhile time.process_time() < {BURN_S}: pass\n"
BURN_AND_STAY = BURN + "time.sleep(30)"
BURN_IN_A_CHILD = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN_AND_STAY!r}])"
BURN_IN_AN_ENDED_CHILD = (
    f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {BURN!r}])\ntime.sleep(30)"
)


def until(true: Callable[[], bool], seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("code", [BURN_AND_STAY, BURN_IN_A_CHILD, BURN_IN_AN_ENDED_CHILD])
@pytest.mark.slow
def test_the_cpu_reader_measures_a_known_load_of_the_whole_tree(code: str, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log, running(python(code), log) as child:
        assert until(lambda: cpu_seconds(child.pid) >= BURN_S - 0.02)
        time.sleep(0.1)
        assert cpu_seconds(child.pid) < BURN_S + 0.25, "the burn, and two interpreters' start"


def test_the_memory_reader_measures_the_memory_of_a_process(tmp_path: Path) -> None:
    code = "import time; held = b'x' * 50_000_000; time.sleep(30)"
    with (tmp_path / "log").open("w") as log, running(python(code), log) as child:
        assert until(lambda: 48 < rss_mib(child.pid) < 100)


def test_a_process_that_has_ended_counts_as_zero() -> None:
    child = subprocess.Popen(python(""))
    child.wait()
    assert (cpu_seconds(child.pid), rss_mib(child.pid)) == (0, 0)


def test_children_are_ended_with_their_parent_even_after_an_error(tmp_path: Path) -> None:
    pids: list[int] = []
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(30)'])"
    with (
        pytest.raises(KeyboardInterrupt),
        (tmp_path / "log").open("w") as log,
        running(python(code), log) as child,
    ):
        assert until(lambda: len(list(tree(child.pid))) == 2)
        pids.extend(tree(child.pid))
        raise KeyboardInterrupt
    assert until(lambda: not any(alive(pid) for pid in pids))


def test_a_process_that_will_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STOP_S", 0.2)
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(30)"
    )
    child = subprocess.Popen(python(code), start_new_session=True, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    end_group(child)
    child.stdout.close()
    assert child.returncode == -9


def test_a_command_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(BenchError, match="cannot start no-such-gateway"),
        (tmp_path / "log").open("w") as log,
        running(["no-such-gateway"], log),
    ):
        pass


def test_a_gateway_that_ends_early_is_reported_with_the_end_of_its_log(program: Path, small: Case) -> None:
    contender = Contender("broken", f"{sys.executable} -c \"raise SystemExit('no such flag')\"")
    with pytest.raises(BenchError, match=r"broken .* ended with status 1(?s:.*)no such flag"):
        measure(program, contender, small)


def test_waiting_for_readiness_ends_after_its_timeout(tmp_path: Path) -> None:
    with (
        (tmp_path / "log").open("w") as log,
        running(python("import time; time.sleep(30)"), log) as child,
        pytest.raises(BenchError, match="no answer"),
    ):
        wait_ready(child, free_port(), "/ready", 0.1)


def test_free_ports_lie_below_the_ephemeral_range() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert free_port() < lowest


@pytest.mark.slow
def test_a_measurement_is_complete_and_leaves_no_process_behind(program: Path, small: Case) -> None:
    contender = Contender("engine", f"{program} engine --port {{port}} --tick-us 5000", "/health")
    measured = measure(program, contender, small)
    assert (measured.ok, measured.failed, measured.handed_off) == (48, 0, 0)
    assert 0 < measured.cpu_per_token < 1000
    assert measured.cpu_per_request == pytest.approx(measured.cpu_per_token * 10)
    assert 0 < measured.ready_seconds < 5
    assert measured.rss > 0
    assert not [pid for pid in tree(os.getpid()) if str(program) in Path(f"/proc/{pid}/cmdline").read_text()]
