"""Authentication: clients by their keys, operators by the admin key."""

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
"""Methods that read and change nothing."""

_LOCAL_PEERS = frozenset({"127.0.0.1", "::1", "::ffff:127.0.0.1"})
"""Addresses from which this machine's own programs connect. Not all of 127.0.0.0/8: a service mesh's sidecar forwards
other machines' connections from 127.0.0.6."""

_FORWARDED = re.compile(
    rb".*forward.*|via|.*proxy.*|.*(real|client|remote|connecting|original)[-_]?(ip|addr|host|for|url|uri).*"
    rb"|x-(host|scheme|original|rewrite)\b.*|cf-.*|cdn-.*|.*-cdn-.*|.*envoy.*|x-amz.*|x-azure-.*|x-appengine-.*"
    rb"|fastly-.*|fly-.*|x-vercel-.*|akamai-.*|x-arr-.*|tailscale-.*"
).fullmatch
"""Headers that proxies add to the requests that they forward."""


class Credentials:
    """Checks keys: a bearer token, or for clients Anthropic's `x-api-key`. Keys are kept as digests, and compared in
    constant time."""

    def __init__(self, settings: Settings) -> None:
        self._clients = [(_digest(key.get_secret_value().encode()), name) for name, key in settings.client_keys()]
        key = settings.admin_key
        self._admin = [(_digest(key.get_secret_value().encode()), "admin")] if key else []

    def check_client(self, authorization: bytes, api_key: bytes = b"") -> str:
        """The name of the client whose key a header holds; `anonymous` where no client keys are set.

        Arguments:
            authorization: the Authorization header.
            api_key: the x-api-key header.
        Raises:
            Unauthorized: keys are set, and no header holds one.
        """
        if not self._clients:
            return ANONYMOUS
        if name := _whose(authorization, self._clients) or (api_key and _whose(b"bearer " + api_key, self._clients)):
            return name
        raise Unauthorized("this gateway requires an API key: Authorization: Bearer <key>, or x-api-key: <key>")

    def has_admin_key(self, authorization: bytes) -> bool:
        """Whether a request has the admin key; False where none is set.

        Arguments:
            authorization: the Authorization header.
        """
        return bool(self._admin) and bool(_whose(authorization, self._admin))

    def check_operator(self, scope: Mapping[str, Any]) -> None:
        """Raise unless a request comes from an operator, with the admin key. Where no admin key is set, programs on
        this machine may read, and no request may change anything ([operating](../../docs/operating.md#security)).

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
    """Credentials at `admin_socket`: a program that may open the socket's file is an operator."""

    def __init__(self) -> None:
        pass

    def check_client(self, authorization: bytes, api_key: bytes = b"") -> str:
        return ANONYMOUS

    def check_operator(self, scope: Mapping[str, Any]) -> None:
        """Raise where the request was forwarded by a proxy or sent by a web page.

        Raises:
            Forbidden
        """
        if why := _passed_on(scope["headers"]):
            raise Forbidden(f"only this machine's own programs may use admin_socket: {why}")


class Trusted(Credentials):
    """Accepts every request, on a socket that only the gateway's own workers can reach."""

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
    """The name that belongs to the key in the header, or an empty string."""
    scheme, _, token = authorization.partition(b" ")
    if scheme.lower() != b"bearer":
        return ""
    digest = _digest(token.strip())
    found = ""
    for known, name in digests:  # always all of them, so that the time does not depend on which one matches
        if hmac.compare_digest(digest, known):
            found = found or name
    return found


def _not_local(scope: Mapping[str, Any]) -> str:
    """Why a request may come from another machine, by its connection and its Host; empty where it cannot."""
    peer: Sequence[object] | None = scope["client"]
    if peer is None or str(peer[0]) not in _LOCAL_PEERS:
        return "the connection is not this machine's"
    if scope["http_version"] != "1.1":
        return "it came as HTTP/1.0, as proxies pass requests on"
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    if len(hosts) != 1 or not _names_loopback(hosts[0].decode("latin-1")):
        return "its Host is no loopback address"  # but a name that DNS resolves to this machine (DNS rebinding)
    return ""


def _passed_on(headers: list[tuple[bytes, bytes]]) -> str:
    """Why the headers say that a proxy forwarded the request or a web page sent it; empty where they do not."""
    for name, value in headers:
        if name == b"origin" or (name == b"sec-fetch-site" and value.strip().lower() != b"none"):
            return "a web page has sent it"
        if _FORWARDED(name):
            return f"a proxy has passed it on ({name.decode('latin-1')})"
    return ""


def _names_loopback(host: str) -> bool:
    """Whether a Host header is `localhost` or a loopback address."""
    name = re.sub(r":[0-9]+\Z", "", host.strip())
    if name.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name[1:-1] if name[:1] == "[" and name[-1:] == "]" else name)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
