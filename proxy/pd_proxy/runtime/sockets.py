"""The listening sockets: opened here, shared with another gateway, or inherited from systemd.

Two gateways can serve one address while the newer takes over from the older, in two ways. With `reuse_port` each has a
listening socket of its own, and the kernel shares new connections out between them; `steer_here` gives them all to the
newer. A socket that systemd holds is one socket for both, so that nothing is shared out and nothing can be lost.
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
_RESERVED_FILES = 128  # logs, probes, scrapers, the event loop's own, and what is held to a few backends
_FEW_BACKENDS = 16
_FIRST_INHERITED = 3  # sd_listen_fds(3)
_UNSENT = 128 * 1024  # bytes that the kernel keeps for a client beyond what is on its way: with 4 MB it hides slowness
_SO_ATTACH_REUSEPORT_CBPF = 51  # asm-generic/socket.h; Python has no name for it
_RETURN = 0x06  # BPF_RET | BPF_K


class ListenError(Exception):
    """The address cannot be listened on."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket, or one that is about to.

    Attributes:
        inherited: it came from the process that started this one, which keeps it open.
        taken: another process listened on its address when it was made.
    """

    socket: socket.socket
    inherited: bool = False
    taken: bool = False

    @property
    def url(self) -> str:
        host, port = self.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def shared(self) -> bool:
        """Whether others listen on its address too, who get what this one does not take."""
        return self.inherited or _listening(self.socket) > 1


def bind(host: str, port: int, *, reuse: bool, patience: float) -> Listener:
    """A socket at an address, tuned for clients.

    It listens at once, but for one with `reuse` where another has the address: that one only when it is told to, since
    from then on it gets a share of the connections.

    Arguments:
        reuse: share the address with other processes of the same user that do so too.
        patience: seconds after which a client that takes nothing, or has vanished, is let go.
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
        tune(sock, patience)
        if not taken:
            sock.listen(BACKLOG)
        return Listener(sock, taken=taken)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ListenError(f"cannot listen on {host}:{port}: {why}") from None


def unix_socket(path: Path) -> socket.socket:
    """A socket that listens at a path; what a process that is gone has left there is replaced."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(BACKLOG)
    return sock


@contextlib.contextmanager
def own_socket(path: Path, *, reuse: bool) -> Iterator[socket.socket]:
    """A socket that listens at a path, to which only this process's user may connect, and whose file goes with it. What
    a process that is gone has left there is replaced in one step, so that the path leads somewhere at any moment.

    Arguments:
        reuse: take the path over from a process that listens there.
    Raises:
        ListenError
    """
    try:
        if os.path.lexists(path) and not path.is_socket():
            raise ListenError(f"cannot listen at {path}: there is a file that is no socket")
        if not reuse and _answers(path):
            raise ListenError(f"cannot listen at {path}: another process does")
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(new))
        new.chmod(0o600)  # before it listens: until then nobody can connect
        sock.listen(BACKLOG)
        file = new.stat().st_ino
        new.replace(path)
    except OSError as error:
        raise ListenError(f"cannot listen at {path}: {error.strerror or error}") from None
    try:
        yield sock
    finally:
        with contextlib.suppress(OSError):
            if path.lstat().st_ino == file:  # else it is a successor's
                path.unlink()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def inherited(patience: float) -> list[Listener]:
    """The listening sockets that systemd passes to this process (sd_listen_fds(3)); none: it passes none.

    Arguments:
        patience: as of `bind`.
    Raises:
        ListenError: what was passed is no listening stream socket.
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
            raise ListenError(f"file descriptor {descriptor} (LISTEN_FDS) is no listening TCP socket")
        sock.set_inheritable(False)
        tune(sock, patience)
        listeners.append(Listener(sock, inherited=True))
    return listeners


def tune(sock: socket.socket, patience: float) -> None:
    """What the connections that a socket accepts get from it, where the system knows the option."""
    options = (
        ("SOL_SOCKET", "SO_KEEPALIVE", 1),  # clients that vanish while their engine computes
        ("IPPROTO_TCP", "TCP_KEEPIDLE", 60),
        ("IPPROTO_TCP", "TCP_KEEPINTVL", 15),
        ("IPPROTO_TCP", "TCP_KEEPCNT", 4),
        ("IPPROTO_TCP", "TCP_USER_TIMEOUT", int(patience * 1000)),  # ... and with bytes on their way
        ("IPPROTO_TCP", "TCP_NOTSENT_LOWAT", _UNSENT),
    )
    for level, name, value in options:
        if hasattr(socket, name):
            with contextlib.suppress(OSError):
                sock.setsockopt(getattr(socket, level), getattr(socket, name), value)


def steer_here(sock: socket.socket) -> None:
    """From now on connections to an address that several sockets share come to this one alone.

    It must have been the last to listen. The kernel asks a program of one instruction, "return n", for each new
    connection; its n-th socket in the order of their listening gets it. When there is no n-th any more, because an
    older one has closed, the kernel shares out as before. Where it knows no such program, nothing changes.
    """
    program = ctypes.create_string_buffer(struct.pack("=HBBI", _RETURN, 0, 0, _listening(sock) - 1))
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, struct.pack("@HP", 1, ctypes.addressof(program)))


def _taken(family: int, address: tuple[str, int]) -> bool:
    """Whether another socket listens on an address: one that does not wish to share it cannot even be bound."""
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
    """How many sockets listen on the address of one that does, itself included; 1 where the system does not say."""
    table = Path("/proc/net/tcp6" if sock.family == socket.AF_INET6 else "/proc/net/tcp")
    try:
        rows = [line.split() for line in table.read_text().splitlines() if " 0A " in line]
    except OSError:
        return 1
    inode = str(os.fstat(sock.fileno()).st_ino)
    addresses = [(row[1], row[9]) for row in rows]
    ours = next((address for address, number in addresses if number == inode), None)
    return max(1, sum(address == ours for address, _ in addresses))


def notify(state: str) -> None:
    """Tell the process that started this one how it stands (sd_notify(3)), where it wants to know."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
            sock.sendall(state.encode())


def raise_file_limit() -> int:
    """Allow as many open files as may be; the usual soft limit of 1024 would end at some hundred streams.

    Returns how many that are.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


def connection_limit(files: int, backends: int = 0) -> int:
    """How many connections of clients fit into so many open files: a stream has one, and one for each leg.

    Arguments:
        backends: engines, each of which has a connection that is held, and one for what it is asked aside.
    """
    return max(16, (files - _RESERVED_FILES - 2 * max(0, backends - _FEW_BACKENDS)) // 3)
