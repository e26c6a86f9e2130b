"""`python -m pd_proxy_simulator`."""

from __future__ import annotations

import argparse
import sys

from pd_proxy_simulator.command import add_arguments, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m pd_proxy_simulator", description="A simulated vLLM engine.")
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
