"""Real vLLM engines on loopback: how one is started, queried and stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import httpx

from .metrics import series
from .processes import Group, ended, free_port, wait_until

MODEL_NAME = "tiny"
MAX_MODEL_LEN = 2048
BLOCK_SIZE = 32
"""Tokens per KV block. NIXL on the CPU takes multiples of 32 only; vLLM's own default there is 128."""
BATCHED_TOKENS = 512
"""Longest prefill step. A longer prompt is computed in several steps, so that it can be aborted between two of them."""
LEASE_SECONDS = 30
"""How long prefill keeps blocks that are not pulled (vLLM's default, set explicitly because tests wait less than
this)."""
START_SECONDS = 300.0
"""Limit of a start: most of it is Python's import in three processes for each engine, 60 to 100 s for three engines
on two cores."""

COMMON_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # Where this is set (containers often do), every start would compile thousands of modules again, which doubles its
    # time.
    "PYTHONDONTWRITEBYTECODE": "",
    # Loopback everywhere: otherwise torch's and UCX's choice of an interface would depend on the machine.
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "UCX_NET_DEVICES": "lo",
    # Otherwise the sampler would compile C++ at the first request for log probabilities: 15 s, and it needs a compiler.
    "TORCH_COMPILE_DISABLE": "1",
    "UCX_TLS": "sm,tcp,self",  # with tcp alone, transfers stalled for 1 to 30 s
    "NIXL_LOG_LEVEL": "WARN",
    "VLLM_ENABLE_RESPONSES_API_STORE": "1",
    # One unpinned compute thread for each engine: pinned ones would all be on the same core.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


class Role(Enum):
    """The role of an engine; the value is vLLM's `kv_role`."""

    PREFILL = "kv_producer"
    DECODE = "kv_consumer"
    SINGLE = ""
    """No connector at all: the reference for comparison with the pair."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One running vLLM server: a process group of API server, engine core and worker."""

    role: Role
    url: str
    group: Group

    @property
    def pid(self) -> int:
        return self.group.pid

    def is_healthy(self) -> bool:
        """Whether /health answers 200 now. Raises RuntimeError where the engine's process has ended."""
        self.group.check_alive()
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def metrics(self) -> dict[str, float]:
        """vLLM's own series, without the `vllm:` prefix and the labels every series has."""
        page = httpx.get(f"{self.url}/metrics", timeout=10).raise_for_status().text
        return series(page, "vllm:", without=("engine", "model_name"))

    def is_idle(self) -> bool:
        """Whether no request runs or waits and no KV block is held."""
        now = self.metrics()
        return not any(now[name] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))

    def workers(self) -> list[int]:
        """Process ids of the processes that compute: the API server's grandchildren, started by its engine core.

        They are not found by name: the titles that vLLM gives its processes are not always visible from outside.
        """
        parents = group_members(self.pid)
        return [pid for pid, parent in parents.items() if parent in parents and parent != self.pid]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop the engine's computation, while its API server goes on answering."""
        workers = self.workers()
        assert workers, f"no worker in the process group {self.pid}: {group_members(self.pid)}"
        try:
            for pid in workers:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGCONT)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Stop the whole engine: its sockets stay open, and nothing answers."""
        self.group.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.group.signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to the whole process group, as when the machine fails."""
        self.group.kill()

    def terminate(self) -> None:
        """SIGTERM to its first process, as Kubernetes and systemd send it; returns at once."""
        self.group.process.terminate()

    def start_again(self) -> None:
        """Start the engine with the same command and ports after it has ended; returns when it is healthy."""
        self.group.start_again()
        wait_until(
            self.is_healthy, START_SECONDS, f"the engine at {self.url} to be healthy again, log {self.group.log}"
        )


def group_members(group_id: int) -> dict[int, int]:
    """The processes of a process group, each with its parent's id."""
    members = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:  # it has ended since it was listed
            continue
        # The fields after the name in parentheses, which may hold any character: state, parent, process group.
        parent, group = stat.rpartition(")")[2].split()[1:3]
        if int(group) == group_id:
            members[int(folder.name)] = int(parent)
    return members


def command_line(
    python: Path,
    model: Path,
    port: int,
    role: Role,
    config: Callable[[Role], dict[str, object]],
    more_arguments: Sequence[str] = (),
) -> list[str]:
    # Not `vllm serve`: the console script looks up a distribution named vllm, and the CPU build has another name.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-batched-tokens", str(BATCHED_TOKENS)]
    command += ["--block-size", str(BLOCK_SIZE), "--kv-cache-memory-bytes", str(64 * 1024**2)]
    # float32 and no compiled graph: the same tokens from the same prompt, whichever engine computes them.
    command += ["--dtype", "float32", "--enforce-eager"]
    command += ["--enable-scale-out"]
    # Its log names each request, and its usage has the tokens that the prefix cache had.
    command += ["--enable-log-requests", "--enable-prompt-tokens-details"]
    if role is not Role.SINGLE:
        command += ["--kv-transfer-config", json.dumps(config(role))]
    return [*command, *more_arguments]


def transfer_config(role: Role) -> dict[str, object]:
    return {
        "kv_connector": "NixlConnector",
        "kv_role": role.value,
        "kv_buffer_device": "cpu",
        # A lost KV cache must reach the gateway as an error: with "recompute" the engine would hide it.
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"kv_lease_duration": LEASE_SECONDS, "num_threads": 0},
    }


def environment(role: Role) -> dict[str, str]:
    if role is Role.SINGLE:
        return COMMON_ENVIRONMENT
    return COMMON_ENVIRONMENT | {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
        # A variable of small_machine.py, which explains why prefill needs the thread and decode must not have it.
        "NIXL_PROG_THREAD": "1" if role is Role.PREFILL else "0",
    }


@contextmanager
def running(
    python: Path,
    model: Path,
    roles: Sequence[Role],
    logs: Path,
    *,
    config: Callable[[Role], dict[str, object]] = transfer_config,
    more_environment: Mapping[str, str] | None = None,
    more_arguments: Sequence[str] = (),
    dev_mode: Collection[int] = (),
) -> Iterator[list[Engine]]:
    """Start one engine for each role, all at once; yields them in that order when all are healthy.

    Arguments:
        python: interpreter of the virtual environment that install.sh made.
        model: directory that tiny_model.py made.
        logs: existing directory for one log of each engine.
        config: the `--kv-transfer-config` of an engine with a role.
        more_environment: variables that are added to the usual ones or replace them.
        more_arguments: of each engine's command line, after the usual ones.
        dev_mode: positions in `roles` of engines that can be paused and put to sleep (VLLM_SERVER_DEV_MODE).

    Raises:
        RuntimeError: an engine ended while it started; the message holds the end of its log.
        TimeoutError: an engine was not healthy within `START_SECONDS`.
    """
    with ExitStack() as stack:
        engines = []
        for place, role in enumerate(roles):
            port = free_port()
            log = logs / f"{place + 1}-{role.name.lower()}.log"
            variables = environment(role) | dict(more_environment or {})
            if place in dev_mode:
                variables["VLLM_SERVER_DEV_MODE"] = "1"
            group = Group(command_line(python, model, port, role, config, more_arguments), log, variables)
            stack.enter_context(ended(group))
            engines.append(Engine(role, f"http://127.0.0.1:{port}", group))
        for engine in engines:
            what = f"{engine.role.name.lower()} engine at {engine.url} to be healthy, log {engine.group.log}"
            wait_until(engine.is_healthy, START_SECONDS, what)
        yield engines
