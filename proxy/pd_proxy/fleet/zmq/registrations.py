"""Registrations: engines report every few seconds the coordinates of their side of the hand-off.

The senders are not authenticated, so a registration can change little: the coordinates of a backend that is in the
fleet already, on that backend's own host. So no sender can have KV caches sent to another host, or take a backend's
place. If the settings name networks, engines in them may also join the fleet by registering, and name hosts in them.

An engine of such a connector is out of the rotation until it has registered, and again when it has not done so for
`zmq.expiry` seconds.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address
from time import monotonic
from typing import Annotated, Literal, Protocol
from urllib.parse import urlsplit

import msgspec

from pd_proxy.decoding import msgpack_decoder
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.state import Event
from pd_proxy.fleet.zmq.listener import ZmqListener
from pd_proxy.handoff.coordinates import Announcement
from pd_proxy.handoff.traits import Traits
from pd_proxy.settings.engines import ZmqSettings

log = logging.getLogger("pd_proxy.fleet")

MOST = 1024
"""Backends that registrations may add."""
_CALM = 1.0  # seconds between two log lines about registrations, and between two looks at the addresses of the fleet

Outcome = Literal["taken", "unknown", "refused", "garbage"]
HostPort = tuple[str, int]


class RegistrationDecoder(Protocol):
    """The part of a connector that reads its engines' registrations."""

    @property
    def traits(self) -> Traits: ...

    def read_registration(self, message: bytes) -> Announcement: ...


class _Sender(msgspec.Struct):
    """The backend that a registration is about; the connector reads the rest."""

    http_address: Annotated[str, msgspec.Meta(max_length=300)]


_read_sender = msgpack_decoder(_Sender)


class Registrations:
    """The backends that have registered, and the socket on which they do so.

    Arguments:
        decoders: by connector.
        clock: a monotonic clock, in seconds.
    Attributes:
        counts: the number of registrations by outcome: `taken`, `unknown`, `refused` or `garbage`.
    """

    def __init__(
        self,
        fleet: Fleet,
        settings: ZmqSettings,
        decoders: Mapping[str, RegistrationDecoder],
        *,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._fleet = fleet
        self._settings = settings
        self._decoders = decoders
        self._clock = clock
        self._listener: ZmqListener | None = None
        self._sweeping: asyncio.TimerHandle | None = None
        self._until: dict[Backend, float] = {}
        self._added: set[Backend] = set()
        self._known: dict[HostPort, Backend] = {}
        self._looked = self._spoke = float("-inf")
        self.counts: Counter[str] = Counter()

    def start(self) -> None:
        """Listen, if the settings have an address. It does nothing if called again.

        Raises:
            CannotListen
        """
        if self._settings.registrations and self._listener is None:
            self._listener = ZmqListener("ROUTER", self._settings.registrations, self.listen)
            self._sweep_later()

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None

    def forget(self, backend: Backend) -> None:
        """Forget a backend that has left the fleet."""
        self._until.pop(backend, None)
        self._added.discard(backend)
        self._known = {address: other for address, other in self._known.items() if other is not backend}

    def listen(self, parts: Sequence[bytes]) -> None:
        """Handle a message, from any sender."""
        if len(parts) != 1:
            self._not_taken("garbage", "a registration has one part")
            return
        try:
            host, _, port = _read_sender(parts[0]).http_address.rpartition(":")
            address = (host.removeprefix("[").removesuffix("]").lower(), int(port[:5]))
        except ValueError as error:
            self._not_taken("garbage", f"a message that is not a registration: {error}")
            return
        backend = self._find(address)
        decoder = None
        if backend is not None:
            decoder = self._decoders.get(backend.connector)
        elif self._settings.networks:
            decoder = self._decoders.get(self._fleet.groups[self._settings.group])
        if decoder is None or not decoder.traits.registers:
            self._not_taken(
                "unknown", f"{address[0]}:{address[1]} registers, but is not a backend whose connector registers"
            )
            return
        try:
            announcement = decoder.read_registration(parts[0])
            if backend is None:
                backend = self._add(announcement)
            else:
                self._check(backend, announcement)
        except ValueError as error:
            self._not_taken("refused", f"{address[0]}:{address[1]} registers, but is refused: {error}")
            return
        self.counts["taken"] += 1
        self._take(backend, announcement)

    def _take(self, backend: Backend, announcement: Announcement) -> None:
        if not backend.registered:
            log.info("%s backend %s has registered", backend.role, backend.url)
        elif backend.coordinates != announcement.coordinates and self._may_speak():
            log.warning("%s backend %s registers with other coordinates", backend.role, backend.url)
        if backend in self._added and backend.removed and not backend.registered:
            self._fleet.undrain(backend)  # it was about to leave, since it had not registered
        backend.registered = True
        if backend.coordinates != announcement.coordinates:
            backend.locate(announcement.coordinates)
        self._until[backend] = self._clock() + self._settings.expiry

    def _check(self, backend: Backend, announcement: Announcement) -> None:
        """Check that a registration may change a backend.

        Raises:
            ValueError: it may not.
        """
        if announcement.role != backend.role:
            raise ValueError(f"it registers for {announcement.role}, but is a {backend.role} backend")
        host = announcement.coordinates.host
        if host not in self._hosts(backend) and not self._is_near(host):
            raise ValueError(
                f"its KV cache would be at {host}, which is neither its own host nor in one of zmq.networks"
            )

    def _add(self, announcement: Announcement) -> Backend:
        """Let an engine join the fleet.

        Raises:
            ValueError: it may not.
        """
        if not (self._is_near(announcement.host) and self._is_near(announcement.coordinates.host)):
            raise ValueError("it is not in one of zmq.networks")
        if len(self._added) >= MOST:
            raise ValueError(f"{MOST} backends have been added by registrations already")
        host = f"[{announcement.host}]" if ":" in announcement.host else announcement.host
        backend = self._fleet.add(f"http://{host}:{announcement.port}", announcement.role, self._settings.group)
        log.info("%s backend %s has joined by registering", backend.role, backend.url)
        self._added.add(backend)
        self._known[announcement.host, announcement.port] = backend
        return backend

    def _is_near(self, host: str) -> bool:
        """Whether a host is an IP address in one of the networks of the settings."""
        try:
            address = ip_address(host)
        except ValueError:
            return False
        networks: tuple[IPv4Network | IPv6Network, ...] = self._settings.networks
        return any(address in network for network in networks)

    def _find(self, address: HostPort) -> Backend | None:
        """The backend with this address; None if there is none."""
        if address not in self._known and self._clock() - self._looked >= _CALM:
            self._looked = self._clock()
            self._known = {
                (host, _port(backend.url)): backend
                for backend in self._fleet
                if backend.role != "mixed"
                for host in self._hosts(backend)
            }
        return self._known.get(address)

    def _hosts(self, backend: Backend) -> set[str]:
        """A backend's own hosts: that of its URL, and that of its coordinates in the settings."""
        return {
            (urlsplit(backend.url).hostname or "").lower(),
            self._fleet.configured_coordinates(backend.url).host.lower(),
        }

    def _not_taken(self, outcome: Outcome, why: str) -> None:
        self.counts[outcome] += 1
        if self._may_speak():
            log.warning("%s", why)

    def _may_speak(self) -> bool:
        """Whether a line may be logged now that any sender could cause again and again."""
        now = self._clock()
        if now - self._spoke < _CALM:
            return False
        self._spoke = now
        return True

    def _sweep_later(self) -> None:
        self._sweeping = asyncio.get_running_loop().call_later(self._settings.expiry / 8, self._sweep)

    def _sweep(self) -> None:
        """Take out the backends that have not registered for too long. Registrations that came while the event loop
        stood still have not been read yet, so that time does not count."""
        late = 0.0 if self._sweeping is None else asyncio.get_running_loop().time() - self._sweeping.when()
        self._sweep_later()
        if late > self._settings.expiry / 8:
            self._until = {backend: until + late for backend, until in self._until.items()}
        now = self._clock()
        for backend in [backend for backend, until in self._until.items() if until <= now]:
            del self._until[backend]
            backend.registered = False
            self._fleet.take_out(backend, f"has not registered for {self._settings.expiry:g} s", Event.EXPIRED)
            if backend in self._added:
                self._fleet.remove(backend.url, backend.role)


def _port(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)
