"""What a gateway costs compared with nginx: CPU, added delay, memory and start-up.

Puts mock vLLM engines behind the gateway and a load client before it, all on 127.0.0.1, and reads the CPU time of the
gateway's whole process tree from /proc. nginx as a plain reverse proxy of the decode engine alone is measured in the
same rounds, so that the ratio is valid on a noisy machine too. Needs Linux, gcc and nginx. Run from the repository's
root:

    .venv/bin/python -m bench                      all cases, pd-proxy, 3 rounds (a few minutes)
    .venv/bin/python -m bench --quick              paced and short, one short round
    .venv/bin/python -m bench --write              ... and write bench/RESULTS.md
    .venv/bin/python -m bench --case scale         cost and delay against the number of streams (--write: the plots)
    .venv/bin/python -m bench --case connections   memory of idle and of streaming clients (bench/connections.py), and
                                                   the delay of tokens among ten thousand streams (bench/crowd.py)
    .venv/bin/python -m bench --name other --cmd 'other --port {port} --prefill {prefill} --decode {decode}'

Exit status: 0; 1 when a request failed, or with --check when a budget was missed; 2 when something is missing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import cases, connections, crowd, load, machine, plots, report
from bench.cost import NGINX, PEERS, Contender, nginx_path, rounds
from bench.process import BenchError

DEFAULT_COMMAND = "pd-proxy serve --port {port} --prefill {prefill} --decode {decode}"
CONNECTIONS = "connections"
SCALE = "scale"
QUICK = ("paced", "short")  # the cases with a budget
RESULTS = Path(__file__).resolve().parent / "RESULTS.md"
CONNECTIONS_RESULTS = RESULTS.with_name("CONNECTIONS.md")
SCALE_RESULTS = RESULTS.with_name("SCALE.md")
PLOTS = RESULTS.parents[1] / "docs" / "cost.svg"


SHOWN = "CPU time a token, and delay of a token, against the number of streams, beside nginx"


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "\n".join(f"{case.name}: {case.what}" for case in cases.ALL)
    parser.add_argument("--cmd", default=DEFAULT_COMMAND, help="the gateway's command line (default: %(default)s)")
    parser.add_argument("--name", default="pd-proxy", help="its name in the tables (default: %(default)s)")
    parser.add_argument("--ready-path", default="/ready", help="path that answers 200 when the gateway is ready")
    parser.add_argument(
        "--case",
        action="append",
        choices=[*cases.BY_NAME, SCALE, CONNECTIONS],
        help=f"may be repeated; default: all but {SCALE} and {CONNECTIONS}. {what}",
    )
    parser.add_argument("--rounds", type=int, choices=range(1, 21), metavar="1..20", help="default: 3")
    parser.add_argument(
        "--quick", action="store_true", help="a quick estimate: paced and short, one round, a third of the load"
    )
    parser.add_argument("--peers", action="store_true", help="also other P/D gateways found on PATH (vllm-router)")
    parser.add_argument("--json", action="store_true", help="print all numbers of all rounds as JSON, not tables")
    parser.add_argument("--write", action="store_true", help="write bench/RESULTS.md, or the case's own file")
    parser.add_argument("--check", action="store_true", help="end with 1 when a budget is missed")
    return parser.parse_args(arguments)


def chosen_cases(chosen: argparse.Namespace) -> list[cases.Case]:
    """The cases to run, in their own order."""
    names = chosen.case or (QUICK if chosen.quick else tuple(cases.BY_NAME))
    return [case.quick() if chosen.quick else case for case in cases.ALL if case.name in names]


def contenders(chosen: argparse.Namespace) -> list[Contender]:
    """nginx, the gateway, and with --peers the other gateways that are installed."""
    peers = [peer for peer in PEERS if chosen.peers and shutil.which(shlex.split(peer.command)[0])]
    return [NGINX, Contender(chosen.name, chosen.cmd, chosen.ready_path), *peers]


def run(arguments: Sequence[str]) -> int:
    """Measure and print; returns the exit status."""
    chosen = options(arguments)
    if chosen.case == [CONNECTIONS]:
        return run_connections(chosen, arguments)
    for alone in (CONNECTIONS, SCALE):
        if alone in (chosen.case or ()) and chosen.case != [alone]:
            raise BenchError(f"--case {alone} runs alone")
    count = chosen.rounds or (1 if chosen.quick else 3)
    nginx_path()
    program = load.build()
    selected, against = chosen_cases(chosen), contenders(chosen)
    facts = machine.facts(shlex.join(["python", "-m", "bench", *arguments]), count)
    if chosen.case == [SCALE]:
        selected = [case.quick() if chosen.quick else case for case in cases.scale()]
    measured = {case.name: rounds(program, against, case, count) for case in selected}
    if chosen.case == [SCALE]:
        print(report.scale_table(selected, measured))
        if chosen.write:
            SCALE_RESULTS.write_text(report.scale_markdown(selected, measured, facts))
            PLOTS.write_text(plots.svg(report.scale_plots(selected, measured), SHOWN))
            print(f"wrote {SCALE_RESULTS} and {PLOTS}", file=sys.stderr)
        return 0
    if chosen.json:
        print(json.dumps(report.as_json(selected, measured, facts), indent=1))
    else:
        print("\n".join(str(table) for table in report.tables(selected, measured)))
    if chosen.write:
        RESULTS.write_text(report.as_markdown(selected, measured, facts))
        print(f"wrote {RESULTS}", file=sys.stderr)
    comparisons = report.all_comparisons(selected, measured)
    missed = chosen.check and any(one.holds is False for one in comparisons)
    return 1 if missed or any(one.gateway.failed or one.nginx.failed for one in comparisons) else 0


def run_connections(chosen: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Measure the cost of open connections, and the delay of tokens among many streams; returns the exit status."""
    facts = machine.facts(shlex.join(["python", "-m", "bench", *arguments]), 1)
    program, contender = load.build(), Contender(chosen.name, chosen.cmd, chosen.ready_path)
    tables = [connections.table(program, contender), crowd.table(program, contender)]
    print("\n".join(map(str, tables)))
    if chosen.write:
        CONNECTIONS_RESULTS.write_text(report.connections_markdown(tables, facts))
        print(f"wrote {CONNECTIONS_RESULTS}", file=sys.stderr)
    return 0


def interrupt(_number: int, _frame: object) -> None:
    """Let SIGTERM and SIGHUP end the bench as Ctrl-C does, so that the blocks which end its processes are left in
    order."""
    raise KeyboardInterrupt


def main() -> int:
    """Run the command; returns the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        return run(sys.argv[1:])
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted; all its processes have ended", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
