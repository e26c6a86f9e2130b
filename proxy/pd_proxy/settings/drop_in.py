"""The flags of the example script that this gateway replaces (vllm-ascend's load_balance_proxy_server_example.py).

As in the script, the i-th host goes with the i-th port, and both lists must have the same length. Once any of its flags
is used, the script's defaults apply to the others: localhost, port 8001 for prefill, port 8002 for decode.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from pd_proxy.settings.problems import ConfigurationError

_POOLS = (("prefill", "prefiller", 8001), ("decode", "decoder", 8002))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the script's flags, and their singular forms, which the script accepts too."""
    group = parser.add_argument_group("flags of the example script", "For a drop-in replacement.")
    for _, word, port in _POOLS:
        group.add_argument(
            f"--{word}-hosts", f"--{word}-host", nargs="+", metavar="HOST", help=f"{word} hosts (default localhost)"
        )
        group.add_argument(
            f"--{word}-ports", f"--{word}-port", nargs="+", type=int, metavar="PORT", help=f"their ports ({port})"
        )
    group.add_argument("--max-retries", type=int, metavar="N", help="tries of a request (retries.attempts)")
    group.add_argument("--retry-delay", type=float, metavar="SECONDS", help="has no effect: tries follow at once")
    group.add_argument("--max-waiting-retries", type=int, metavar="N", help="has no effect: probing never gives up")
    group.add_argument(
        "--waiting-retry-interval", type=float, metavar="SECONDS", help="longest wait between probes of a lost backend"
    )


def translate(arguments: argparse.Namespace, flags: dict[str, Any]) -> list[str]:
    """Add the script's flags to the settings in `flags`. Returns notices for the user.

    Raises:
        ConfigurationError: hosts and ports do not pair.
    """
    notices = []
    given = {word: (getattr(arguments, f"{word}_hosts"), getattr(arguments, f"{word}_ports")) for _, word, _ in _POOLS}
    if any(hosts or ports for hosts, ports in given.values()):
        for role, word, port in _POOLS:
            hosts, ports = given[word]
            flags[role] = ",".join([*filter(None, [flags.get(role)]), *_pair(word, hosts, ports, port)])
        if (key := os.environ.get("OPENAI_API_KEY")) and "backend_api_key" not in flags:
            flags["backend_api_key"] = key  # the script sends it to its backends
    if arguments.max_retries is not None:
        flags.setdefault("retries", {}).setdefault("attempts", max(1, arguments.max_retries))
    if arguments.waiting_retry_interval is not None:
        flags.setdefault("health", {}).setdefault("longest_wait", arguments.waiting_retry_interval)
    for name, why in (
        ("retry_delay", "a failed request goes to another backend at once"),
        ("max_waiting_retries", "a backend that is down is probed until it is back"),
    ):
        if getattr(arguments, name) is not None:
            notices.append(f"--{name.replace('_', '-')} has no effect: {why}")
    return notices


def _pair(word: str, hosts: list[str] | None, ports: list[int] | None, port: int) -> list[str]:
    hosts = hosts or ["localhost"]
    ports = ports or [port]
    if len(hosts) != len(ports):
        raise ConfigurationError(
            f"--{word}-hosts names {len(hosts)} host(s) and --{word}-ports {len(ports)} port(s); the i-th host goes "
            "with the i-th port, so repeat a host for each of its ports"
        )
    urls = [
        f"http://[{host}]:{number}" if ":" in host else f"http://{host}:{number}"
        for host, number in zip(hosts, ports, strict=True)
    ]
    return list(dict.fromkeys(urls))  # as in the script, a pair that is given twice counts once
