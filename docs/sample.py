"""Write the sample of `pd-proxy doctor` in operating.md, from a run against simulated engines.

python docs/sample.py            writes it
python docs/sample.py --check    exits 1 when what is there is not what doctor says now
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from proxy.doctor.examination import examine  # noqa: E402 - the checkout's own package, installed or not
from proxy.settings import build_settings  # noqa: E402
from proxy.simulator import Simulator, SimulatorConfig  # noqa: E402

PAGE = HERE / "operating.md"
_SAMPLE = re.compile(r"(<!-- sample of doctor, written by docs/sample\.py -->\n```text\n).*?(```\n)", re.DOTALL)
_WRONG_HOST = "127.0.0.9"  # at which nobody listens


def main(argv: Sequence[str] | None = None) -> int:
    """Write the sample, or check it; gives the exit status."""
    parser = argparse.ArgumentParser(description="Write the sample of pd-proxy doctor in operating.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when it is stale")
    arguments = parser.parse_args(argv)
    before = PAGE.read_text(encoding="utf-8")
    after = with_sample(before, asyncio.run(sample()))
    if arguments.check and after != before:
        print("docs/operating.md has another sample than doctor; run: python docs/sample.py", file=sys.stderr)
    elif after != before:
        PAGE.write_text(after, encoding="utf-8")
    return int(arguments.check and after != before)


def with_sample(page: str, text: str) -> str:
    """A page with its sample replaced."""
    found, times = _SAMPLE.subn(lambda match: match[1] + text + match[2], page)
    assert times == 1, "operating.md has one place for the sample"
    return found


async def sample() -> str:
    """What doctor says of two prefill engines, one of which calls itself by a wrong address, and two decode engines,
    one of which is dead. Their addresses are shown as those of four machines."""
    async with AsyncExitStack() as stack:

        async def engine(role: str, **config: Any) -> Simulator:
            made = SimulatorConfig(role=role, handshake_timeout=0.1, **config)  # type: ignore[arg-type]
            return await stack.enter_async_context(Simulator(made))

        p, wrong = await engine("prefill"), await engine("prefill", side_host=_WRONG_HOST)
        d, dead = await engine("decode"), await engine("decode")
        dead.kill()
        flags = {"prefill": [p.url, wrong.url], "decode": [d.url, dead.url]}
        report = await examine(build_settings(flags, {}))
    shown = {f"{_WRONG_HOST}:{wrong.side_port}": "10.0.0.9:5600"}
    for host, one in (("10.0.0.1", p), ("10.0.0.2", wrong), ("10.0.1.1", d), ("10.0.1.2", dead)):
        shown |= {f"127.0.0.1:{one.port}": f"{host}:8000", f"127.0.0.1:{one.side_port}": f"{host}:5600"}
    said: str = _renamed(report, shown).as_text()
    return said


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """A value with other addresses in all its texts."""
    if isinstance(value, str):
        return re.sub("|".join(map(re.escape, names)), lambda match: names[match[0]], value)
    if isinstance(value, tuple):
        return tuple(_renamed(one, names) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _renamed(getattr(value, field.name), names) for field in fields(value)})
    return value


if __name__ == "__main__":
    sys.exit(main())
