"""Make the installed vLLM and NIXL fit a machine of two cores. For tests only; never for a deployment.

usage: VENV/bin/python small_machine.py

Both libraries poll in tight loops, because in production a core per engine costs little and a microsecond does not.
Here two or three engines (three processes each) share two cores: their loops starve one another until handshakes time
out. The protocol, the KV transfer and the sampling are not changed: only how long an idle thread sleeps.

Every edit must find its text exactly once. So another version of a library fails the installation, instead of running
silently without the edit.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Edit:
    """One replacement in one installed file, and why it is needed."""

    module: str
    why: str
    old: str
    new: str


EDITS = (
    Edit(
        module="nixl_cu13._api",
        why="The progress thread polls with a timeout of 0: a whole core per engine, idle ones too (83-87 % measured). "
        "With 2 ms it takes 2-4 %, and a transfer waits 2 ms at most.",
        old="agent_config.pthrDelay = 0\n",
        new="agent_config.pthrDelay = 2000\n",
    ),
    Edit(
        module="nixl_cu13._api",
        why="On decode the same thread starves the one that makes the handshake (30 s measured): off there. On prefill "
        "it must be on, or the first connection hangs. NIXL has no setting for it, so engines.py sets this variable.",
        old="agent_config.useProgThread = nixl_conf.enable_pthread\n",
        new="agent_config.useProgThread = (\n"
        "            nixl_conf.enable_pthread and __import__('os').environ.get('NIXL_PROG_THREAD') != '0'\n"
        "        )\n",
    ),
    Edit(
        module="vllm.distributed.device_communicators.shm_broadcast",
        why="A reader of the engine's message queue spins for a second after each message: prefill's processes take "
        "the cores from decode's (+1.1 s on every request). 2 ms is about a step of the tiny model.",
        old="busy_loop_s: float = 1,\n",
        new="busy_loop_s: float = 0.002,\n",
    ),
    Edit(
        module="vllm.distributed.device_communicators.shm_broadcast",
        why="Without that spin a reader sleeps until it is woken, and a wake-up can be dropped (its socket holds one): "
        "a step then stalls 5 s. Looking again every 20 ms bounds the stall.",
        old="self.poller.poll(timeout=timeout_ms)",
        new="self.poller.poll(timeout=20 if timeout_ms is None else min(timeout_ms, 20))",
    ),
)


def installed_file(module: str) -> Path:
    """The source file of `module`, found without importing the module itself."""
    parent, _, name = module.rpartition(".")
    spec = importlib.util.find_spec(parent.partition(".")[0])
    if spec is None or spec.origin is None:
        raise SystemExit(f"small_machine.py: {parent} is not installed in this environment")
    return Path(spec.origin).parent.joinpath(*parent.split(".")[1:], f"{name}.py")


def apply(edit: Edit) -> None:
    """Make one edit, or leave a file unchanged that has it already.

    Raises:
        SystemExit: the text to replace is not there exactly once.
    """
    path = installed_file(edit.module)
    text = path.read_text()
    if edit.new in text:
        return
    if text.count(edit.old) != 1:
        raise SystemExit(f"small_machine.py: {edit.old.strip()!r} is not once in {path}: is this another version?")
    path.write_text(text.replace(edit.old, edit.new))


def main() -> None:
    for edit in EDITS:
        apply(edit)
    print(f"small_machine.py: {len(EDITS)} edits in place")


if __name__ == "__main__":
    main()
