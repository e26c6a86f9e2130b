"""Who may ask: clients by their keys, operators by the admin key."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pd_proxy.admission.clients import ANONYMOUS
from pd_proxy.errors import Forbidden, Unauthorized
from pd_proxy.settings.tree import Settings

_READING = frozenset({"GET", "HEAD"})
"""Methods by which an operator looks and changes nothing."""

_LOCAL_PEERS = frozenset({"127.0.0.1", "::1", "::ffff:127.0.0.1"})
"""Addresses from which this machine's own programs connect. Not all of 127.0.0.0/8: a service mesh's sidecar passes
other machines' connections on from 127.0.0.6."""

_FORWARDED = re.compile(
    rb".*forward.*|via|.*proxy.*|.*(real|client|remote|connecting|original)[-_]?(ip|addr|host|for|url|uri).*"
    rb"|x-(host|scheme|original|rewrite)\b.*|cf-.*|cdn-.*|.*-cdn-.*|.*envoy.*|x-amz.*|x-azure-.*|x-appengine-.*"
    rb"|fastly-.*|fly-.*|x-vercel-.*|akamai-.*|x-arr-.*|tailscale-.*"
).fullmatch
"""Headers by which proxies say that they pass somebody else's request on."""


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

    def has_admin_key(self, authorization: bytes) -> bool:
        """Whether a request has the admin key; never where none is set.

        Arguments:
            authorization: that header.
        """
        return bool(self._admin) and bool(_whose(authorization, self._admin))

    def check_operator(self, scope: Mapping[str, Any]) -> None:
        """Raise unless a request is an operator's: it has the admin key. Where no key is set this machine's own
        programs may look, and nobody may change anything ([operating](../../docs/operating.md#security)).

        Arguments:
            scope: the request's ASGI scope.
        Raises:
            Unauthorized, Forbidden
        """
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if self._admin:
            if not _whose(dict(headers).get(b"authorization", b""), self._admin):
                raise Unauthorized("this needs the admin key: Authorization: Bearer <admin_key>")
            return
        if scope["method"] not in _READING:
            raise Forbidden(f"no admin_key is set, so nobody may change this gateway over the network; {_REMEDY}")
        if why := _not_local(scope) or _passed_on(headers):
            raise Forbidden(f"no admin_key is set, so only this machine's own programs may see this: {why}; {_REMEDY}")


class AtSocket(Credentials):
    """For `admin_socket`: the file's permissions have let the client in, so it is an operator."""

    def __init__(self) -> None:
        pass

    def check_client(self, authorization: bytes, api_key: bytes = b"") -> str:
        return ANONYMOUS

    def check_operator(self, scope: Mapping[str, Any]) -> None:
        """Raise where a proxy or a browser has been let in, and others by it."""
        if why := _passed_on(scope["headers"]):
            raise Forbidden(f"only this machine's own programs may use admin_socket: {why}")


class Trusted(Credentials):
    """Accepts every request: for what only the gateway's own workers can reach."""

    def __init__(self) -> None:
        pass

    def check_client(self, authorization: bytes, api_key: bytes = b"") -> str:
        return ANONYMOUS

    def check_operator(self, scope: Mapping[str, Any]) -> None:
        return None


_REMEDY = "set admin_key and send it (Authorization: Bearer <admin_key>), or set admin_socket and ask there"


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


def _not_local(scope: Mapping[str, Any]) -> str:
    """Why a request may be another machine's though no header says so, or an empty string."""
    peer: Sequence[object] | None = scope["client"]
    if peer is None or str(peer[0]) not in _LOCAL_PEERS:
        return "the connection is not this machine's"
    if scope["http_version"] != "1.1":
        return "it came as HTTP/1.0, as proxies pass requests on"
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    if len(hosts) != 1 or not _names_loopback(hosts[0].decode("latin-1")):
        return "its Host is no loopback address"  # a name that somebody's DNS lets lead here (DNS rebinding)
    return ""


def _passed_on(headers: list[tuple[bytes, bytes]]) -> str:
    """Why a request is a proxy's or a browser's page's, as its headers say, or an empty string."""
    for name, value in headers:
        if name == b"origin" or (name == b"sec-fetch-site" and value.strip().lower() != b"none"):
            return "a web page has sent it"
        if _FORWARDED(name):
            return f"a proxy has passed it on ({name.decode('latin-1')})"
    return ""


def _names_loopback(host: str) -> bool:
    """Whether a Host header names this machine as only its own programs do."""
    name = re.sub(r":[0-9]+\Z", "", host.strip())
    if name.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name[1:-1] if name[:1] == "[" and name[-1:] == "]" else name)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
