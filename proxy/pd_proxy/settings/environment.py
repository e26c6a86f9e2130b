"""Reads settings from environment variables such as `PD_PROXY_TIMEOUTS__IDLE`.

Kubernetes adds variables to every container whose names are made from the names of Services. Where the name of a
Service begins with pd-proxy, they have the gateway's prefix (`PD_PROXY_SERVICE_HOST`), and one has the name of a
setting (`PD_PROXY_PORT=tcp://10.0.0.1:80`). They are recognised by name and value together, and ignored.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from pd_proxy.decoding import Undecodable, decode_json_once

PREFIX = "PD_PROXY_"
CONFIG_VARIABLE = "PD_PROXY_CONFIG"
"""The variable with the path of the settings file."""
DEFAULTS_VARIABLE = "PD_PROXY_DEFAULTS"
"""The variable with settings of lower priority than the file, `name=value` separated by commas: for images and
packages."""


@dataclass(slots=True)
class Variables:
    """The result of reading the environment.

    Attributes:
        values: the settings, nested by their groups; each value is text.
        origins: the variable of each setting, by its dotted name.
        defaults: settings of lower priority than the file, nested in the same way.
        services: variables that Kubernetes has made for Services.
        unknown: all other variables with the gateway's prefix.
        problems: a text for each variable that cannot be read.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    services: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def variable(name: str) -> str:
    """The variable of a setting: `timeouts.idle` is `PD_PROXY_TIMEOUTS__IDLE`."""
    return PREFIX + name.upper().replace(".", "__")


def read_variables(environment: Mapping[str, str], settings: Collection[str]) -> Variables:
    """Find the settings in an environment. Names may be in lower case too.

    Arguments:
        settings: the dotted names of all settings.
    """
    found = Variables()
    names = {variable(name): name for name in settings}
    groups = {variable(name.partition(".")[0]): name.partition(".")[0] for name in settings if "." in name}
    prefixed = sorted(name for name in environment if name.upper().startswith(PREFIX))
    members: dict[str, tuple[str, Any]] = {}
    for name in prefixed:
        value, upper = environment[name], name.upper()
        if is_service(name, value):
            found.services.append(name)
        elif upper in names:
            members[names[upper]] = name, value
        elif upper in groups:
            _read_group(found, name, groups[upper], value)
        elif upper == DEFAULTS_VARIABLE:
            _read_defaults(found, name, value, settings)
        elif upper != CONFIG_VARIABLE:
            found.unknown.append(name)
    for setting, (name, value) in members.items():  # after the groups, since the name of a single setting has priority
        put(found.values, setting, value)
        found.origins[setting] = name
    return found


def is_service(name: str, value: str) -> bool:
    """Whether Kubernetes made this variable, for a Service whose name begins with pd-proxy."""
    return any(shape.fullmatch(name) and holds(value) for shape, holds in _SERVICE)


def put(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set a value by its dotted name."""
    *groups, leaf = name.split(".")
    for group in groups:
        inner = tree.get(group)
        if not isinstance(inner, dict):
            inner = tree[group] = {}
        tree = inner
    tree[leaf] = value


def _read_group(found: Variables, name: str, group: str, text: str) -> None:
    try:
        members = decode_json_once(text)
    except Undecodable:
        members = None
    if not isinstance(members, dict):
        found.problems.append(f'{name}: {group}: as a variable, a group must be a JSON object, such as {{"member": 1}}')
        return
    found.values[group] = members
    found.origins |= {f"{group}.{member}": name for member in members}


def _read_defaults(found: Variables, name: str, text: str, settings: Collection[str]) -> None:
    for item in filter(None, map(str.strip, text.split(","))):
        setting, sign, value = item.partition("=")
        if not sign or setting.strip() not in settings:
            found.problems.append(f"{name}: {setting.strip()}: must be a list of setting=value, separated by commas")
        else:
            put(found.defaults, setting.strip(), value.strip())


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) < 65536


def _is_protocol(text: str) -> bool:
    return text in ("tcp", "udp", "sctp")


def _is_url(text: str) -> bool:
    """Whether a text is like tcp://10.0.0.1:80 or tcp://[fd00::1]:80."""
    scheme, sign, rest = text.partition("://")
    host, _, port = rest.rpartition(":")
    address = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    return bool(sign) and _is_protocol(scheme) and _is_address(address) and _is_port(port)


_SERVICE = tuple(
    (re.compile(f"PD_PROXY(_[A-Z0-9_]+)?_({suffix})"), holds)
    for suffix, holds in (
        (r"SERVICE_HOST|PORT_\d+_(TCP|UDP|SCTP)_ADDR", _is_address),
        (r"SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_(TCP|UDP|SCTP)_PORT", _is_port),
        (r"PORT_\d+_(TCP|UDP|SCTP)_PROTO", _is_protocol),
        (r"PORT(_\d+_(TCP|UDP|SCTP))?", _is_url),
    )
)
"""The names of variables that Kubernetes makes (its `envvars` package), each with a check of its value."""
