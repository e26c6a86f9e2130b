"""Starting a gateway that receives messages from engines: what it lacks is reported, and it ends."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

ARGUMENTS = "['serve', '--port=0', '--connector=p2p_nccl', '--zmq.registrations={}', '--zmq.networks=127.0.0.0/8']"


def started(where: str, before: str = "pass") -> subprocess.CompletedProcess[str]:
    """Start a gateway that listens for registrations at an address; returns how that ended."""
    program = f"import sys; {before}; from pd_proxy.cli import main; sys.exit(main({ARGUMENTS.format(where)}))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_without_pyzmq_the_gateway_says_what_to_install_and_ends() -> None:
    ended = started("127.0.0.1:1", "sys.modules['zmq'] = None")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].endswith("pip install pd-proxy[zmq]")


@pytest.mark.slow
def test_a_taken_address_is_named_and_ends_the_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = started(where)
    assert ended.returncode == 1
    assert f"cannot listen for engines on {where}: Address already in use" in ended.stderr


def test_pyzmq_is_not_imported_where_no_connector_needs_it() -> None:
    program = (
        "import sys; from pd_proxy.app import build; from pd_proxy.settings.tree import build_settings; "
        "import pd_proxy.process; "
        "build(build_settings({'prefill': ['a:1'], 'decode': ['b:1']}, {})); sys.exit('zmq' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
