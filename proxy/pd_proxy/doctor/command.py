"""The commands `pd-proxy doctor` and `pd-proxy check --probe`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys

from pd_proxy.doctor.examination import MOST_PAIRS, examine
from pd_proxy.settings.tree import Settings

_INTERRUPTED = 130  # the exit status that shells report for SIGINT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `doctor` that are not settings."""
    parser.add_argument(
        "--pairs",
        type=_count,
        default=MOST_PAIRS,
        metavar="N",
        help="hand-offs to try at most, such that each engine is in one if they suffice; 0: none (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(settings: Settings, *, pairs: int = MOST_PAIRS, as_json: bool = False) -> int:
    """Examine the engines, and print the report. Returns the exit status: 0 without findings but notes, 1 with
    warnings, 2 with faults."""
    log = logging.getLogger("pd_proxy")
    level = log.level
    log.setLevel(logging.CRITICAL)  # the report has all that would be logged
    try:
        report = asyncio.run(examine(settings, most_pairs=pairs))
    except KeyboardInterrupt:
        print("pd-proxy: interrupted", file=sys.stderr)
        return _INTERRUPTED
    finally:
        log.setLevel(level)
    sys.stdout.write(report.as_json() + "\n" if as_json else report.as_text())
    return report.exit_status


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"a whole number, 0 or more, not {text!r}")
    return int(text)
