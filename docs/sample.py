"""Write the samples of commands in the docs: `pd-proxy doctor` in operating.md, from a run against simulated engines,
and `pd-proxy explain` in explain.md, for a decision about imaginary engines.

python docs/sample.py            writes them
python docs/sample.py --check    exits 1 when a sample is not what the command prints now
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

from pd_proxy.commands.explain import as_text  # noqa: E402
from pd_proxy.doctor.examination import examine  # noqa: E402 - the checkout's own package, installed or not
from pd_proxy.fleet.backend import Backend, Lease, Role  # noqa: E402
from pd_proxy.fleet.pool_speeds import PoolSpeeds  # noqa: E402
from pd_proxy.fleet.speeds import join_pool  # noqa: E402
from pd_proxy.flow.decisions import Decisions, explanation_of  # noqa: E402
from pd_proxy.flow.request import Request  # noqa: E402
from pd_proxy.http.response import AsgiResponse  # noqa: E402
from pd_proxy.placement.ask import Ask  # noqa: E402
from pd_proxy.placement.decide import View, decide  # noqa: E402
from pd_proxy.requests.body import read_body  # noqa: E402
from pd_proxy.settings.tree import build_settings  # noqa: E402
from pd_proxy.telemetry.records import RequestRecord  # noqa: E402
from pd_proxy_simulator import Simulator, SimulatorConfig  # noqa: E402

PAGES = {"doctor": HERE / "operating.md", "explain": HERE / "explain.md"}
_SAMPLE = r"(<!-- sample of %s, written by docs/sample\.py -->\n```text\n).*?(```\n)"
_WRONG_HOST = "127.0.0.9"  # where nothing listens


def main(argv: Sequence[str] | None = None) -> int:
    """Write the samples, or check them. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the samples of commands in the docs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when one is stale")
    arguments = parser.parse_args(argv)
    stale = 0
    for command, text in (("doctor", asyncio.run(sample())), ("explain", explained())):
        page = PAGES[command]
        before = page.read_text(encoding="utf-8")
        after = with_sample(before, command, text)
        if after == before:
            continue
        stale = 1
        if arguments.check:
            print(f"docs/{page.name} has another sample than {command}; run: python docs/sample.py", file=sys.stderr)
        else:
            page.write_text(after, encoding="utf-8")
    return stale if arguments.check else 0


def with_sample(page: str, command: str, text: str) -> str:
    """A page with its sample of a command replaced."""
    pattern = re.compile(_SAMPLE % command, re.DOTALL)
    found, times = pattern.subn(lambda match: match[1] + text + match[2], page)
    assert times == 1, f"the page has one place for the sample of {command}"
    return found


def explained() -> str:
    """The output of explain for two prefill engines, of which the busier one has most of the prompt cached, two decode
    engines, and a decode engine that is drained."""
    pools = {"prefill": PoolSpeeds(), "decode": PoolSpeeds()}

    def engine(role: Role, host: str, work: int, tokens: int) -> Backend:
        made = Backend(f"http://{host}:8000", role, speeds=join_pool(pools[role]))
        for leg in range(20):
            made.speeds.given(4000, leg, 4000)
            made.speeds.answered(4000, 4000, 4000, leg + 0.4)
            made.speeds.stepped(0.02, 16, 32_000, leg)
        if work:
            made.speeds.given(work, 100.0, work)
        for _ in range(tokens // 2000):
            Lease(made, 2000)
        return made

    prefills = [engine("prefill", "10.0.0.1", 6000, 6000), engine("prefill", "10.0.0.2", 0, 0)]
    decodes = [engine("decode", "10.0.1.1", 0, 40_000), engine("decode", "10.0.1.2", 0, 60_000)]
    drained = engine("decode", "10.0.1.3", 0, 0)
    view = View(prefills, decodes, (), {"prefill": 2, "decode": 3, "mixed": 0})
    cached = {prefills[0].url: 11_264}
    ask = Ask(lambda: 0.0, now=100.0, prompt_tokens=12_000, decode_tokens=12_512, cached=cached, ttft=2.0, tpot=0.05)
    policies = {"prefill": "auto", "decode": "auto", "mixed": "auto"}
    decision = decide(view, ask, unsplittable="", policies=policies, allow_local_prefill=True)
    body = read_body(b'{"model":"llama","messages":[]}', "chat")
    request = Request(body, AsgiResponse(None, None), RequestRecord("chat", model="llama"))  # type: ignore[arg-type]
    full = explanation_of(view, ask, [(drained, "draining")], decision.chosen)
    return as_text(Decisions().preview(request, ask, decision, full))


async def sample() -> str:
    """The output of doctor for two prefill engines, one of which has a wrong address in its hand-offs, and two decode
    engines, one of which is dead. Their addresses are shown as those of four machines."""
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
