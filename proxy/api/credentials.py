"""Who may ask: clients by their keys, operators by the admin key."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Sequence

from proxy.errors import Forbidden, Unauthorized
from proxy.settings import Settings

Header = tuple[bytes, bytes]

_FORWARDED = {b"forwarded", b"x-forwarded-for", b"x-real-ip"}


class Credentials:
    """Checks bearer tokens. Keys are kept and compared as digests, in constant time."""

    def __init__(self, settings: Settings) -> None:
        self._clients = [_digest(key.get_secret_value().encode()) for key in settings.api_keys]
        self._admin = [_digest(settings.admin_key.get_secret_value().encode())] if settings.admin_key else []

    def check_client(self, authorization: bytes) -> None:
        """Raise `Unauthorized` unless the header holds one of `api_keys`, or none are set."""
        if self._clients and not _matches(authorization, self._clients):
            raise Unauthorized("this gateway wants an API key: Authorization: Bearer <key>")

    def check_operator(self, headers: Iterable[Header], peer: Sequence[object] | None) -> None:
        """Raise unless the request may change the gateway: by the admin key, or, where none is set, from this machine
        (and not through a proxy on it)."""
        seen = dict(headers)
        if self._admin:
            if not _matches(seen.get(b"authorization", b""), self._admin):
                raise Unauthorized("this needs the admin key: Authorization: Bearer <admin_key>")
        elif not _is_loopback(peer) or _FORWARDED & seen.keys():
            raise Forbidden("without an admin_key only clients on the gateway's own machine may do this; set admin_key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _matches(authorization: bytes, digests: list[bytes]) -> bool:
    scheme, _, token = authorization.partition(b" ")
    if scheme.lower() != b"bearer":
        return False
    digest = _digest(token.strip())
    found = False
    for known in digests:  # all of them, so that the time taken tells nothing
        found |= hmac.compare_digest(digest, known)
    return found


def _is_loopback(peer: Sequence[object] | None) -> bool:
    try:
        return peer is not None and ipaddress.ip_address(str(peer[0])).is_loopback
    except ValueError:
        return False
