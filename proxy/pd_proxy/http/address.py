"""The address of an engine, and how a connection to it is made."""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec

from pd_proxy.errors import BackendUnreachable

P = TypeVar("P", bound=asyncio.Protocol)

_NO_FILE_LEFT = (errno.EMFILE, errno.ENFILE)


class Address(msgspec.Struct, frozen=True):
    """The parts of an engine's URL.

    Attributes:
        tls: the URL is of https.
        prefix: the URL's path, which is put before the path of each request.
        authority: the value of the host header.
    """

    host: str
    port: int
    tls: bool
    prefix: str
    authority: bytes

    @classmethod
    def of(cls, url: str) -> Address:
        """The address in a URL.

        Raises:
            ValueError: its port is not a port, or its host is not a host.
        """
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        authority = parts.netloc.rpartition("@")[2].encode("ascii")
        return cls(parts.hostname or "", parts.port or (443 if tls else 80), tls, parts.path.rstrip("/"), authority)

    def head(self, method: bytes, path: str) -> bytes:
        """The beginning of a request's head: the request line and the host."""
        return b"%b %b HTTP/1.1\r\nhost: %b\r\n" % (method, (self.prefix + path).encode("ascii"), self.authority)


async def connect(
    address: Address, make: Callable[[], P], seconds: float, trust: ssl.SSLContext | None
) -> tuple[asyncio.Transport, P]:
    """Make a connection.

    Arguments:
        make: returns the connection's protocol.
        trust: the certificates that the engine's is checked against; None for a connection without TLS.
    Raises:
        BackendUnreachable: the connection was not made within `seconds`. The message says why, without the address.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(seconds):
            return await loop.create_connection(make, address.host, address.port, ssl=trust)
    except TimeoutError:
        raise BackendUnreachable(f"no connection within {seconds:.3g} s") from None
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        # That this process has no file descriptor left says nothing about the backend.
        blame = getattr(error, "errno", None) not in _NO_FILE_LEFT
        raise BackendUnreachable(str(why), blame=blame) from error
