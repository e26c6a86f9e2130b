"""What log lines cost an event loop when standard error is not read: 10,000 request lines a second for some seconds.

    .venv/bin/python -m bench.log_lines [seconds]

Prints the CPU time of a line, the largest delay of the loop's timers with the lines and without them, and how many
lines were dropped. The lines go into a pipe that is never read.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from time import monotonic, thread_time

from pd_proxy.telemetry.log_queue import LogQueue
from pd_proxy.telemetry.logs import RequestLog, TextFormatter
from pd_proxy.telemetry.records import RequestRecord

RATE = 10_000
_TICK = 0.01  # seconds


def main(arguments: list[str]) -> int:
    """Measure and print; returns the exit status."""
    seconds = float(arguments[0]) if arguments else 5.0
    _, writing = os.pipe()
    queue = LogQueue(TextFormatter(), writing)
    logging.basicConfig(level=logging.INFO, handlers=[queue], force=True)
    quiet, _, _ = asyncio.run(_load(seconds, 0))
    late, lines, cpu = asyncio.run(_load(seconds, RATE))
    print(f"{lines / seconds:.0f} lines a second into a pipe that nobody reads: {1e6 * cpu / lines:.1f} us of CPU each")
    print(f"{queue.dropped} of {lines} were dropped")
    print(f"the loop's latest timer: {1e3 * late:.1f} ms late with them, {1e3 * quiet:.1f} ms without")
    return 0


async def _load(seconds: float, rate: int) -> tuple[float, int, float]:
    """Write this many request lines a second. Returns the largest delay of a timer, the number of lines, and their
    CPU time."""
    sink = RequestLog(every=True)
    record = RequestRecord("chat", "0" * 32, "model", prefill="http://prefill:8000", decode="http://decode:8000")
    record.status, record.outcome, record.tokens, record.ended = 200, "ok", 70, record.started + 1.0
    late, lines, cpu = 0.0, 0, 0.0
    began = due = monotonic()
    while due < began + seconds:
        due += _TICK
        await asyncio.sleep(max(0.0, due - monotonic()))
        late = max(late, monotonic() - due)
        before = thread_time()
        while lines < rate * (due - began):
            sink.finished(record)
            lines += 1
        cpu += thread_time() - before
    return late, lines, cpu


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
