"""Detects requests that loop: a gateway whose backends lead back to itself would pass them on without end.

Every request to an engine carries the ids of the gateways that have forwarded it, in a header of its own, since proxies
rewrite and merge `Via` (RFC 9110). A gateway behind a gateway is allowed. So a request is refused only if it has come
back to this gateway, or has passed through `MOST` gateways.
"""

from __future__ import annotations

import re
from hashlib import sha256
from secrets import token_hex

from pd_proxy.errors import LoopDetected

HEADER = b"x-pd-proxy-hops"
MOST = 8
_ids = re.compile(rb"\b[0-9a-f]{16}\b").findall


class Hops:
    """The hops of one gateway's requests.

    Arguments:
        shared: what its workers have in common and no other gateway has; empty where it has none.
    Attributes:
        line: the header of what this gateway sends by itself.
    """

    def __init__(self, shared: str = "") -> None:
        self._own = (sha256(shared.encode()).hexdigest()[:16] if shared else token_hex(8)).encode("ascii")
        self.line = b"%b: %b\r\n" % (HEADER, self._own)

    def passed(self, said: bytes) -> bytes:
        """The gateways that a request has come through, as `onward` takes them.

        Arguments:
            said: its header.
        Raises:
            LoopDetected: this is one of them, or there are too many.
        """
        ids: list[bytes] = _ids(said)
        if self._own in ids:
            raise LoopDetected("this request has come back to a gateway that it came from: a backend there leads here")
        if len(ids) >= MOST:
            raise LoopDetected(f"this request has come through {len(ids)} gateways; {MOST} is the most")
        return b", ".join(ids)

    def onward(self, passed: bytes) -> bytes:
        """The header of what this gateway sends on for a request that has come through others."""
        return b"%b: %b, %b\r\n" % (HEADER, passed, self._own) if passed else self.line
