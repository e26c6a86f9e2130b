"""Addresses in settings: URLs, hosts, networks and sockets, checked and brought into one form."""

from __future__ import annotations

import os
import re
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Annotated
from urllib.parse import urlsplit, urlunsplit

from pydantic import AfterValidator, BeforeValidator

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:/|https?([:/]|$)", re.IGNORECASE)


_ROUTE = re.compile(r"/(v\d+/(chat/)?(completions|models|messages|responses|embeddings)|health|metrics|ping|generate)")


def backend_url(value: str) -> str:
    """A backend's URL in normal form: scheme and host in lower case, an explicit port kept, no trailing slash."""
    text = value.strip()
    shown = repr(value.rpartition("@")[2].partition("?")[0])  # the parts before and behind may contain a secret
    if "://" not in text:
        if _SCHEME.match(text):
            raise ValueError(f"{shown}: the scheme must be followed by a colon and two slashes, as in http://host:port")
        text = f"http://{text}"
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"{shown}: a backend's URL must be ASCII without spaces (an international host in punycode)")
    parts = urlsplit(text)
    if parts.scheme.lower() not in ("http", "https"):
        raise ValueError(f"{shown}: a backend is http://host:port or https://host:port")
    if not parts.hostname:
        raise ValueError(f"{shown} names no host")
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise ValueError(f"{parts.hostname}: the port must be a number from 1 to 65535")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"{parts.hostname}: credentials do not belong in a backend's URL; set backend_api_key")
    if parts.query or parts.fragment:
        raise ValueError(f"{shown}: a backend's URL has no query and no fragment")
    if parts.netloc.endswith(":"):
        raise ValueError(f"{parts.hostname}: a colon without a port")
    check_host(parts.hostname, bracketed="[" in parts.netloc)
    path = parts.path.rstrip("/").removesuffix("/v1")  # as in a base_url copied from a client's settings
    if _ROUTE.fullmatch(path):
        raise ValueError(f"{shown}: {path} is one of an engine's routes; a backend's URL ends before it")
    if "//" in parts.path.rstrip("/") + "/":
        raise ValueError(f"{shown}: its path has an empty segment")
    return f"{parts.scheme.lower()}://{parts.netloc.lower()}{path}"


def check_host(host: str, *, bracketed: bool = False) -> None:
    """Check that a host is a name or an address.

    Raises:
        ValueError: it is neither.
    """
    if bracketed or re.fullmatch(r"[0-9.]+", host):
        try:
            ip_address(host.partition("%")[0])
        except ValueError:
            raise ValueError(f"{host} is not an IP address") from None
    elif not _HOST.fullmatch(host) or ".." in host:
        raise ValueError(f"{host!r} is not a host name")


def split_list(value: object) -> object:
    """Split a list that is given as one string with commas, as in the environment and in flags."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _network(value: object) -> IPv4Network | IPv6Network:
    return ip_network(str(value).strip())


Networks = Annotated[
    tuple[Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)], ...], BeforeValidator(split_list)
]


BackendUrls = Annotated[tuple[Annotated[str, AfterValidator(backend_url)], ...], BeforeValidator(split_list)]


def _publisher(value: str) -> str:
    """Check the ZeroMQ endpoint of engines: `tcp://{host}:5557`, where `{host}` stands for the host of each engine's
    URL."""
    text = value.strip()
    if not text:
        return ""
    try:
        parts = urlsplit(text.replace("{host}", "host"))
        good = parts.scheme == "tcp" and bool(parts.hostname) and bool(parts.port)
        good = good and not (parts.path or parts.query or parts.fragment or parts.username)
    except ValueError:
        good = False
    if not good or "*" in text:
        raise ValueError(f"{value!r}: must be tcp://{{host}}:PORT, where {{host}} stands for each engine's host")
    return text


PublisherEndpoint = Annotated[str, AfterValidator(_publisher)]


def _origin(value: str) -> str:
    """An origin in the form that browsers send."""
    text = value.strip().lower()
    if text == "*":
        return text
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://([a-z0-9._~%-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", text):
        raise ValueError(f"{value[:128]!r}: an origin is scheme://host or scheme://host:port, without a path; or *")
    for scheme, port in (("http", ":80"), ("https", ":443")):
        if text.startswith(f"{scheme}://"):
            text = text.removesuffix(port)
    return text


Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], BeforeValidator(split_list)]


def _socket_address(value: str) -> str:
    """Check `host:port` of a socket to bind. The host is an IP address, IPv6 in brackets."""
    text = value.strip().removeprefix("tcp://")
    if not text:
        return ""
    try:
        parts = urlsplit(f"//{text}")
        ip_address(parts.hostname or "")
        good = bool(parts.port) and not (parts.path or parts.query or parts.fragment or parts.username)
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"{value!r}: must be an IP address of this machine and a port, such as 10.0.0.9:7500")
    return text


SocketAddress = Annotated[str, AfterValidator(_socket_address)]


def _socket_path(value: str) -> str:
    """Check the path of a Unix socket. The kernel's limit is 107 bytes, and the path has a process id appended at
    first."""
    text = value.strip()
    if len(os.fsencode(text)) > 95 or "\0" in text:
        raise ValueError(f"{value[:128]!r}: the path of a unix socket has at most 95 bytes")
    return text


SocketPath = Annotated[str, AfterValidator(_socket_path)]


def own_url(value: str) -> str:
    """Check a URL of the gateway that engines call."""
    url = backend_url(value)
    host = urlsplit(url).hostname or ""
    if host == "0.0.0.0" or host == "::":  # noqa: S104 - refused
        raise ValueError(f"{host} is not an address that engines can call; name an address of this machine")
    return url


def listening_host(value: str) -> str:
    """Check a host to listen on."""
    text = value.strip()
    if text == "*":
        raise ValueError("all addresses are 0.0.0.0, or :: for IPv6")
    if "://" in text or "/" in text or re.fullmatch(r"[^:]*:\d*|\[.*\]:\d*", text):
        raise ValueError(f"{value!r}: must be only a host, without scheme and port")
    host = text.removeprefix("[").removesuffix("]")
    if not host:
        raise ValueError("must not be empty; all addresses are 0.0.0.0")
    check_host(host, bracketed=":" in host)
    return host


def with_port(url: str) -> str:
    """A backend's URL with its port, also where that is the scheme's default: `http://a` becomes `http://a:80`."""
    parts = urlsplit(url)
    return url if parts.port else urlunsplit(parts._replace(netloc=f"{parts.netloc}:{_PORTS[parts.scheme]}"))


_PORTS = {"http": 80, "https": 443}


def overlap(one: str, other: str) -> bool:
    """Whether the same port cannot be bound at both addresses."""
    return one == other or not {"0.0.0.0", "::"}.isdisjoint((one, other))  # noqa: S104 - compared
