"""The listening sockets: opened here, shared with another gateway, or inherited from systemd.

Two gateways can serve one address while the newer takes over from the older, in two ways:

- With `reuse_port` each has a listening socket of its own, and the kernel distributes new connections between them.
  `steer_here` directs all of them to the newer one.
- A socket that systemd holds is the same socket for both, so no connection can be lost when the older one closes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BACKLOG = 4096
_RESERVED_FILES = 128  # for logs, probes, scrapers, the event loop, and connections held to the first few backends
_FEW_BACKENDS = 16
_FIRST_INHERITED = 3  # sd_listen_fds(3)
_UNSENT = 128 * 1024  # bytes that the kernel buffers unsent for a client; with up to 4 MB a slow client is not noticed
_SO_ATTACH_REUSEPORT_CBPF = 51  # asm-generic/socket.h; Python has no name for it
_RETURN = 0x06  # BPF_RET | BPF_K


class ListenError(Exception):
    """The gateway cannot listen on an address."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that listens, or that is bound and will listen.

    Attributes:
        inherited: whether it was passed by the process that started this one, which keeps it open.
        taken: whether another process listened on its address when it was opened.
    """

    socket: socket.socket
    inherited: bool = False
    taken: bool = False

    @property
    def url(self) -> str:
        host, port = self.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def shared(self) -> bool:
        """Whether another process listens on its address too, and so accepts the connections that this one does not."""
        return self.inherited or _listening(self.socket) > 1


def bind(host: str, port: int, *, reuse: bool, timeout: float) -> Listener:
    """Open a socket at an address, with the options for clients' connections.

    The socket listens at once, except where `reuse` is set and another process has the address. Then the caller makes
    it listen later, since from then on it gets a share of the connections.

    Arguments:
        reuse: share the address with other processes of the same user that share it too.
        timeout: the seconds after which the connection of a client that reads nothing, or has vanished, is closed.
    Raises:
        ListenError
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if reuse:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address[:2])
        taken = reuse and _taken(family, sock.getsockname()[:2])
        tune(sock, timeout)
        if not taken:
            sock.listen(BACKLOG)
        return Listener(sock, taken=taken)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ListenError(f"cannot listen on {host}:{port}: {why}") from None


def unix_socket(path: Path) -> socket.socket:
    """Open a Unix socket that listens at a path. Replaces the file that an ended process has left there."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(BACKLOG)
    return sock


@contextlib.contextmanager
def own_socket(path: Path, *, reuse: bool) -> Iterator[socket.socket]:
    """Open a Unix socket that listens at a path, and remove its file at the end.

    Only the user of this process may connect to it. The file of another process is replaced in one step, so that the
    path exists at any moment.

    Arguments:
        reuse: take the path over from a process that still listens there.
    Raises:
        ListenError
    """
    try:
        if os.path.lexists(path) and not path.is_socket():
            raise ListenError(f"cannot listen at {path}: there is a file that is not a socket")
        if not reuse and _answers(path):
            raise ListenError(f"cannot listen at {path}: another process listens there")
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(new))
        new.chmod(0o600)  # before it listens, since until then no process can connect
        sock.listen(BACKLOG)
        file = new.stat().st_ino
        new.replace(path)
    except OSError as error:
        raise ListenError(f"cannot listen at {path}: {error.strerror or error}") from None
    try:
        yield sock
    finally:
        with contextlib.suppress(OSError):
            if path.lstat().st_ino == file:  # otherwise the file is that of a process that took over
                path.unlink()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def inherited(timeout: float) -> list[Listener]:
    """The listening sockets that systemd has passed to this process (sd_listen_fds(3)); empty where it has passed none.

    Arguments:
        timeout: as in `bind`.
    Raises:
        ListenError: a file that was passed is not a listening TCP socket.
    """
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return []
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    listeners = []
    for descriptor in range(_FIRST_INHERITED, _FIRST_INHERITED + count):
        try:
            sock = socket.socket(fileno=descriptor)
            listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise ListenError(f"file descriptor {descriptor} (LISTEN_FDS): {error.strerror}") from None
        if sock.type != socket.SOCK_STREAM or sock.family == socket.AF_UNIX or not listening:
            raise ListenError(f"file descriptor {descriptor} (LISTEN_FDS) is not a listening TCP socket")
        sock.set_inheritable(False)
        tune(sock, timeout)
        listeners.append(Listener(sock, inherited=True))
    return listeners


def tune(sock: socket.socket, timeout: float) -> None:
    """Set the options that accepted connections inherit from a listening socket, where the system has the option.

    Arguments:
        timeout: as in `bind`.
    """
    options = (
        ("SOL_SOCKET", "SO_KEEPALIVE", 1),  # notices clients that vanish while the engine computes
        ("IPPROTO_TCP", "TCP_KEEPIDLE", 60),
        ("IPPROTO_TCP", "TCP_KEEPINTVL", 15),
        ("IPPROTO_TCP", "TCP_KEEPCNT", 4),
        ("IPPROTO_TCP", "TCP_USER_TIMEOUT", int(timeout * 1000)),  # and those that vanish with bytes in flight
        ("IPPROTO_TCP", "TCP_NOTSENT_LOWAT", _UNSENT),
    )
    for level, name, value in options:
        if hasattr(socket, name):
            with contextlib.suppress(OSError):
                sock.setsockopt(getattr(socket, level), getattr(socket, name), value)


def steer_here(sock: socket.socket) -> None:
    """Direct all new connections to an address that several sockets share to this socket.

    It must be the one that began to listen last. The kernel runs a BPF program of one instruction, "return n", for each
    new connection, and the n-th socket in the order of listening gets the connection. Where there is no n-th socket any
    more, because an older one was closed, the kernel distributes connections as before. Where the system does not
    support such a program, this does nothing.
    """
    program = ctypes.create_string_buffer(struct.pack("=HBBI", _RETURN, 0, 0, _listening(sock) - 1))
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, struct.pack("@HP", 1, ctypes.addressof(program)))


def _taken(family: int, address: tuple[str, int]) -> bool:
    """Whether another socket listens on an address. A probe socket that does not share the address cannot be bound
    then."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind(address)
        except OSError:
            return True
    return False


def _listening(sock: socket.socket) -> int:
    """The number of sockets that listen on a listening socket's address, itself included; 1 where the system does not
    say."""
    table = Path("/proc/net/tcp6" if sock.family == socket.AF_INET6 else "/proc/net/tcp")
    try:
        rows = [line.split() for line in table.read_text().splitlines() if " 0A " in line]
    except OSError:
        return 1
    inode = str(os.fstat(sock.fileno()).st_ino)
    addresses = [(row[1], row[9]) for row in rows]
    own = next((address for address, number in addresses if number == inode), None)
    return max(1, sum(address == own for address, _ in addresses))


def notify(state: str) -> None:
    """Report a state to the process that started this one (sd_notify(3)), where it has asked for that."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
            sock.sendall(state.encode())


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard limit. The usual soft limit of 1024 allows only some hundred
    streams.

    Returns the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


def connection_limit(files: int, backends: int = 0) -> int:
    """How many client connections are possible with a limit of open files. A stream needs one file for its client, and
    one for each leg.

    Arguments:
        files: the limit of open files.
        backends: the number of engines; each needs one file for its sentinel connection, and one for control requests.
    """
    return max(16, (files - _RESERVED_FILES - 2 * max(0, backends - _FEW_BACKENDS)) // 3)
