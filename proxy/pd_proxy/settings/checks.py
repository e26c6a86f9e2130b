"""Checks of settings against each other. Each raises `Misfit` for settings that contradict each other."""

from __future__ import annotations

from urllib.parse import urlsplit

from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy.settings.addresses import overlap, with_port
from pd_proxy.settings.bounds import ClientSettings, Targets
from pd_proxy.settings.engines import DEFAULT_GROUP, Location
from pd_proxy.settings.fields import SettingsFields
from pd_proxy.settings.problems import Misfit

_NOTIFY = frozenset(name for name, connector in CONNECTORS.items() if connector.traits.notified)
_REGISTER = frozenset(name for name, connector in CONNECTORS.items() if connector.traits.registers)
_CALL_BACK = frozenset(name for name, connector in CONNECTORS.items() if connector.traits.called_back)


def check_roles(settings: SettingsFields) -> None:
    """Check that each backend has one role in one group, and that locations name backends."""
    seen: dict[str, str] = {}
    names = [group.name for group in settings.all_groups()]
    if len(names) != len(set(names)):
        raise Misfit("groups", f"groups: each has a name of its own, and none is {DEFAULT_GROUP}")
    for position, group in enumerate(settings.all_groups(), -1):
        for role in ("prefill", "decode", "mixed", "encode"):
            place = role if group.name == DEFAULT_GROUP else f"{role} of group {group.name}"
            for item, url in enumerate(getattr(group, role)):
                backend = with_port(url)
                if other := seen.get(backend):
                    where = f"twice under {place}" if other == place else f"under {other} and under {place}"
                    setting = f"{role}.{item}" if position < 0 else f"groups.{position}.{role}.{item}"
                    raise Misfit(setting, f"{url} is listed {where}; a backend has one role (use mixed for both)")
                seen[backend] = place
    for item, location in enumerate(settings.locations):
        if with_port(location.backend) not in seen:
            raise Misfit(f"locations.{item}.backend", f"locations: {location.backend} is not a backend of this gateway")
    if len({location.backend for location in settings.locations}) != len(settings.locations):
        raise Misfit("locations", "locations: a backend is listed twice")


def check_models(settings: SettingsFields) -> None:
    """Check that aliases and the default model name models."""
    for alias, model in settings.aliases.items():
        if model in settings.aliases:
            raise Misfit(
                f"aliases.{alias}", f"aliases: {alias} stands for {model}, which is an alias too; name the model"
            )
    if settings.unknown_model == "default" and not settings.default_model:
        raise Misfit("unknown_model", "unknown_model: default needs a default_model")


def check_reports(settings: SettingsFields) -> None:
    """Check that connectors whose engines send messages over ZeroMQ have a socket for these, in a single process."""
    if settings.zmq.group not in {group.name for group in settings.all_groups()}:
        raise Misfit("zmq.group", f"zmq.group: there is no group {settings.zmq.group}")
    located = {location.backend: location for location in settings.locations}
    for group in settings.all_groups():
        at = "connector" if group.name == DEFAULT_GROUP else "groups"
        joined = bool(settings.zmq.networks) and group.name == settings.zmq.group
        if joined and group.connector not in _REGISTER:
            raise Misfit(
                "zmq.networks", f"zmq.networks: engines of {group.connector} (group {group.name}) do not register"
            )
        if group.connector not in _NOTIFY | _REGISTER or not (group.prefill or group.decode or joined):
            continue
        if settings.reuse_port or settings.workers > 1:
            other = "reuse_port" if settings.reuse_port else "several workers"
            raise Misfit(
                "reuse_port" if settings.reuse_port else "workers",
                f"{group.connector}: not with {other}, since engines send their messages to one process only",
            )
        if group.connector in _REGISTER:
            if not settings.zmq.registrations:
                raise Misfit(at, f"{group.connector}: zmq.registrations must be set; its engines register there")
            continue
        if not settings.zmq.notices:
            raise Misfit(
                at, f"{group.connector}: zmq.notices must be set; its prefill engines send notifications there"
            )
        for url in group.decode:
            location = located.get(url) or Location.model_construct(backend=url)
            if not location.init_ports or len(location.alloc_ports) != len(location.init_ports):
                raise Misfit(
                    "decode" if at == "connector" else at,
                    f"{group.connector}: {url} needs init_ports and as many alloc_ports in locations, "
                    "one for each of its tensor-parallel ranks",
                )
            if location.query_ports and len(location.query_ports) != len(location.init_ports):
                raise Misfit(
                    "locations",
                    f"{group.connector}: {url} has fewer or more query_ports than init_ports in locations",
                )


def check_ports(settings: SettingsFields) -> None:
    """Check that no two sockets have the same port, and that bounds and kinds do not contradict each other."""
    if settings.port and settings.metrics.port == settings.port:
        raise Misfit("metrics.port", f"metrics.port: {settings.port} is taken by port; leave it out for /metrics there")
    bound = [("port", settings.host, settings.port), ("metrics.port", settings.host, settings.metrics.port)]
    for name, address in (("zmq.notices", settings.zmq.notices), ("zmq.registrations", settings.zmq.registrations)):
        parts = urlsplit(f"//{address}")
        for other, host, port in bound:
            if port and port == parts.port and overlap(host, parts.hostname or ""):
                raise Misfit(name, f"{name}: {port} is taken by {other}", other)
        bound.append((name, parts.hostname or "", parts.port))
    if settings.breaker.ejection > settings.breaker.longest_ejection:
        raise Misfit(
            "breaker.ejection", "breaker.ejection: it is above breaker.longest_ejection", "breaker.longest_ejection"
        )
    for position, group in enumerate(settings.all_groups(), -1):
        if group.kind == "openai" and group.prefill and group.decode:
            raise Misfit(
                "kind" if position < 0 else f"groups.{position}.kind",
                "kind: backends of kind openai have no hand-off; list them under mixed, or set another kind",
            )


def check_callbacks(settings: SettingsFields) -> None:
    """Check that engines that call the gateway back have a URL for it."""
    used = _CALL_BACK.intersection(group.connector for group in settings.all_groups())
    if used and settings.metaserver.url is None:
        raise Misfit(
            "connector" if settings.connector in used else "groups",
            f"metaserver.url: decode engines that speak {', '.join(sorted(used))} call the gateway back; set the "
            "URL at which they reach this gateway",
        )


def check_targets(settings: SettingsFields) -> None:
    """Check that targets can be met within the time limits."""
    owners: list[tuple[str, Targets | ClientSettings]] = [
        ("targets", settings.targets),
        *((f"clients.{n}", client) for n, client in enumerate(settings.clients)),
    ]
    limits = {
        "ttft": {"timeouts.total": settings.timeouts.total, "timeouts.prefill": settings.timeouts.prefill},
        "tpot": {"timeouts.total": settings.timeouts.total, "timeouts.idle": settings.timeouts.idle},
    }
    for owner, targets in owners:
        for name, bounds in limits.items():
            target = getattr(targets, name)
            for bound, seconds in bounds.items():
                if target is not None and seconds is not None and target > seconds:
                    at = f"{owner}.{name}"
                    raise Misfit(at, f"{at}: {bound} ends a request after {seconds:g} s, before its target", bound)
    if settings.admission.slo != "off" and all(targets.ttft is None for _, targets in owners):
        raise Misfit("admission.slo", f"admission.slo: {settings.admission.slo} needs targets.ttft, or a client's own")


def check_clients(settings: SettingsFields) -> None:
    """Check that no two clients have the same name or key."""
    names, keys = set[str](), dict[str, str]()
    for place, (name, secret) in enumerate(settings.client_keys()):
        other = keys.setdefault(secret.get_secret_value(), name)
        if name in names:
            raise Misfit("clients", f"clients: two of them are named {name}")
        if other != name and place >= len(settings.api_keys):  # the same key twice in api_keys does no harm
            raise Misfit("clients", f"clients: {other} and {name} have the same key")
        names.add(name)


ALL = (
    check_roles,
    check_models,
    check_reports,
    check_ports,
    check_callbacks,
    check_targets,
    check_clients,
)
"""All checks, in order."""
