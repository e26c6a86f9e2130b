"""``python -m proxy.simulator``."""

from __future__ import annotations

import argparse
import sys

from proxy.simulator.command import add_arguments, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m proxy.simulator", description="A simulated vLLM engine.")
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
