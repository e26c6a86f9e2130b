"""The health check of the container image: checks whether the gateway in this container answers.

usage: python -m pd_proxy.commands.container_health [PID]        PID: the container's first process; 1 by default

It finds the gateway's listening sockets in /proc, since the port may come from a flag, a variable or a file. It imports
only the standard library, so that a check every few seconds costs little. Linux only.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import sys
from collections.abc import Iterator
from pathlib import Path

_TIMEOUT = 1.0  # seconds for one answer; a container has few listeners
_LISTENS = "0A"  # TCP_LISTEN in /proc/net/tcp


def main(argv: list[str]) -> int:
    """Return 0 where a listening socket of the processes answers /health with 200, else 1."""
    listeners = sorted(set(listeners_of(int(argv[0]) if argv else 1)))
    for host, port in listeners:
        if _answers(host, port):
            return 0
    print(f"no answer at {', '.join(f'{host}:{port}' for host, port in listeners) or 'any port'}", file=sys.stderr)
    return 1


def listeners_of(process: int) -> Iterator[tuple[str, int]]:
    """Address and port of each listening TCP socket of a process and its descendants."""
    for number in _family(process):
        sockets = set()
        for descriptor in _listed(Path(f"/proc/{number}/fd")):
            with contextlib.suppress(OSError):
                target = str(descriptor.readlink())
                if target.startswith("socket:["):
                    sockets.add(target[8:-1])
        for table in ("tcp", "tcp6"):
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{number}/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == _LISTENS and fields[9] in sockets:
                        yield _address(fields[1])


def _family(process: int) -> set[int]:
    parents = {}
    for folder in _listed(Path("/proc")):
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
                parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # the process has ended, or is another user's
        return []


def _address(text: str) -> tuple[str, int]:
    """Read an address of /proc/net/tcp: 32-bit words in this machine's byte order, and a port, both hexadecimal."""
    host, _, port = text.partition(":")
    words = [int(host[start : start + 8], 16).to_bytes(4, sys.byteorder) for start in range(0, len(host), 8)]
    address = ipaddress.ip_address(b"".join(words))
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return str(address), int(port, 16)


def _answers(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT)  # it ignores http_proxy
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (TimeoutError, OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
