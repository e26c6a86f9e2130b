"""Who may ask: clients by their keys, operators by the admin key."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Sequence

from proxy.admission.clients import ANONYMOUS
from proxy.errors import Forbidden, Unauthorized
from proxy.settings import Settings

Header = tuple[bytes, bytes]

_FORWARDED = {b"forwarded", b"x-forwarded-for", b"x-real-ip"}


class Credentials:
    """Checks keys: a bearer token, or for clients Anthropic's `x-api-key`. They are kept and compared as digests, in
    constant time."""

    def __init__(self, settings: Settings) -> None:
        self._clients = [(_digest(key.get_secret_value().encode()), name) for name, key in settings.client_keys()]
        key = settings.admin_key
        self._admin = [(_digest(key.get_secret_value().encode()), "admin")] if key else []

    def check_client(self, authorization: bytes, api_key: bytes = b"") -> str:
        """The client's name; raises `Unauthorized` unless a header holds a client's key, or there are none.

        Arguments:
            authorization: that header.
            api_key: `x-api-key`.
        """
        if not self._clients:
            return ANONYMOUS
        if name := _whose(authorization, self._clients) or (api_key and _whose(b"bearer " + api_key, self._clients)):
            return name
        raise Unauthorized("this gateway wants an API key: Authorization: Bearer <key>, or x-api-key: <key>")

    def check_operator(self, headers: Iterable[Header], peer: Sequence[object] | None) -> None:
        """Raise unless the request may change the gateway: by the admin key, or, where none is set, from this machine
        (and not through a proxy on it)."""
        seen = dict(headers)
        if self._admin:
            if not _whose(seen.get(b"authorization", b""), self._admin):
                raise Unauthorized("this needs the admin key: Authorization: Bearer <admin_key>")
        elif not _is_loopback(peer) or _FORWARDED & seen.keys():
            raise Forbidden("without an admin_key only clients on the gateway's own machine may do this; set admin_key")


class Trusted(Credentials):
    """Believes whoever asks: for what only the gateway's own workers can reach."""

    def __init__(self) -> None:
        pass

    def check_client(self, authorization: bytes, api_key: bytes = b"") -> str:
        return ANONYMOUS

    def check_operator(self, headers: Iterable[Header], peer: Sequence[object] | None) -> None:
        return None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _whose(authorization: bytes, digests: list[tuple[bytes, str]]) -> str:
    """The name beside the key that the header holds, or an empty string."""
    scheme, _, token = authorization.partition(b" ")
    if scheme.lower() != b"bearer":
        return ""
    digest = _digest(token.strip())
    found = ""
    for known, name in digests:  # all of them, so that the time taken tells nothing
        if hmac.compare_digest(digest, known):
            found = found or name
    return found


def _is_loopback(peer: Sequence[object] | None) -> bool:
    try:
        return peer is not None and ipaddress.ip_address(str(peer[0])).is_loopback
    except ValueError:
        return False
