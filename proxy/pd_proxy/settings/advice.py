"""Warnings about settings that are allowed but probably not intended. Shown at the start and by `pd-proxy check`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from math import inf, isfinite
from urllib.parse import urlsplit

from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy.settings.engines import DEFAULT_GROUP, BackendGroup
from pd_proxy.settings.tree import Settings

_OWN_CONNECTOR = {"sglang": "sglang", "tensorrt_llm": "tensorrt_llm"}
"""The engine families that have one connector, which no other family has."""
_REGISTRATION_PERIOD = 3.0  # seconds between an engine's registrations


@dataclass(frozen=True, slots=True)
class Advice:
    """One warning.

    Attributes:
        setting: the dotted name of the setting in question, with the number of an item where it is a list.
        text: the warning.
    """

    setting: str
    text: str


def advise(settings: Settings) -> list[Advice]:
    """All warnings about these settings."""
    found = [*_open(settings), *_timeouts(settings), *_events(settings), *_itself(settings)]
    for position, group in enumerate(settings.all_groups(), -1):
        found += _pools(settings, group, "" if position < 0 else f"groups.{position}.")
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listening address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _open(settings: Settings) -> Iterator[Advice]:
    keys = {key.get_secret_value() for _, key in settings.client_keys()}
    if not keys and not is_loopback(settings.host):
        yield Advice(
            "host",
            f"host: clients need no key, and {settings.host} can be reached from elsewhere; set api_keys or clients, "
            "or listen on 127.0.0.1",
        )
    if settings.admin_key is not None and settings.admin_key.get_secret_value() in keys:
        yield Advice("admin_key", "admin_key: a client has the same key, and so may change the gateway")


def _timeouts(settings: Settings) -> Iterator[Advice]:
    total = settings.timeouts.total or inf
    for name in ("prefill", "first_token", "idle"):
        value = getattr(settings.timeouts, name)
        if value > total and name in settings.timeouts.model_fields_set:
            yield Advice(
                f"timeouts.{name}",
                f"timeouts.{name}: {value:g} s never pass, since timeouts.total ends a request at {total:g} s",
            )
    if settings.zmq.registrations and settings.zmq.expiry <= _REGISTRATION_PERIOD:
        yield Advice(
            "zmq.expiry", f"zmq.expiry: engines register every {_REGISTRATION_PERIOD:g} s, so they will come and go"
        )


def _events(settings: Settings) -> Iterator[Advice]:
    """Warn of KV events that no policy uses, and of a tokenizer without KV events."""
    publishing = [group for group in settings.all_groups() if group.kv_events.endpoint]
    policies = {settings.policy.prefill, settings.policy.decode, settings.policy.mixed}
    if publishing and policies.isdisjoint(("auto", "prefix")) and settings.admission.slo == "off":
        setting = "kv_events.endpoint" if settings.kv_events.endpoint else "groups"
        yield Advice(setting, f"{setting}: no policy uses what engines have cached, so KV events are not followed")
    if settings.tokenizer and not publishing:
        yield Advice("tokenizer", "tokenizer: it is used only for KV events, and no engine publishes any")


def _itself(settings: Settings) -> Iterator[Advice]:
    """Warn of a backend at the gateway's own address."""
    for position, group in enumerate(settings.all_groups(), -1):
        for role in ("prefill", "decode", "mixed", "encode"):
            for item, url in enumerate(getattr(group, role)):
                parts = urlsplit(url)
                host = parts.hostname or ""
                everywhere = settings.host in ("0.0.0.0", "::")  # noqa: S104 - compared
                same = host == settings.host or (is_loopback(host) and (everywhere or is_loopback(settings.host)))
                if settings.port and parts.port == settings.port and same:
                    prefix = "" if position < 0 else f"groups.{position}."
                    yield Advice(f"{prefix}{role}.{item}", f"{role}: {url} is the address of this gateway itself")


def _pools(settings: Settings, group: BackendGroup, prefix: str) -> Iterator[Advice]:
    named = "" if not settings.groups else f" of group {group.name}"
    joined = bool(settings.zmq.networks) and group.name == settings.zmq.group
    pools = [role for role in ("prefill", "decode", "mixed") if getattr(group, role)]
    alone = "prefill" if pools == ["prefill"] else "decode" if pools == ["decode"] else ""
    if joined:
        pass  # backends may register later
    elif alone == "prefill":
        yield Advice(
            f"{prefix}prefill",
            f"decode: no backend{named} could take what prefill hands over; nothing will be answered",
        )
    elif alone == "decode":
        what = (
            "and with fallback: reject nothing will be answered"
            if settings.fallback == "reject"
            else "so decode computes every prompt itself; list backends that do both under mixed"
        )
        yield Advice(f"{prefix}decode", f"prefill: there is no backend{named}, {what}")
    elif group.encode and not pools:
        yield Advice(f"{prefix}encode", f"encode: no backend{named} uses the encoders' output")
    elif not pools and (group.name != DEFAULT_GROUP or not settings.groups):
        yield Advice(
            f"{prefix}name" if prefix else "prefill",
            f"no backend{named} is configured (--prefill, --decode, --mixed); they can be added at /instances/add",
        )
    yield from _connector(settings, group, prefix)


def _connector(settings: Settings, group: BackendGroup, prefix: str) -> Iterator[Advice]:
    if not (group.prefill and group.decode) or group.connector == "auto":
        return
    own = _OWN_CONNECTOR.get(group.kind)
    if own is not None and group.connector != own:
        yield Advice(f"{prefix}kind", f"connector: backends of kind {group.kind} speak {own}, not {group.connector}")
    if group.kind != group.connector and group.connector in _OWN_CONNECTOR.values():
        yield Advice(f"{prefix}connector", f"kind: only backends of kind {group.connector} speak that connector")
    lease = CONNECTORS[group.connector].traits.lease
    if isfinite(lease) and settings.timeouts.handoff > lease / 2:
        yield Advice(
            "timeouts.handoff",
            f"timeouts.handoff: {settings.timeouts.handoff:g} s have no effect: engines of {group.connector} keep a "
            f"hand-off for {lease:g} s, and none is sent after half of it",
        )
