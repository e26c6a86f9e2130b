"""Reads what engines report on their own pages: models, version, hand-off protocol, coordinates, KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

import msgspec

from pd_proxy.decoding import decode_json
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.health.fingerprints import CONFIGURATION, configured, counted, speaker
from pd_proxy.fleet.health.kv_cache import read_cache
from pd_proxy.fleet.health.probe import NOT_AS_EXPECTED, Probe, ProbeFailed
from pd_proxy.fleet.health.profile import Profile, read_from_elsewhere, read_profile
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.traits import Traits

# Seconds for the page of an engine's configuration: vLLM inspects its whole environment for it.
_CONFIGURATION_TIMEOUT = 10.0


class CoordinatesReader(Protocol):
    """The part of a connector that recognises its engines and reads their coordinates."""

    @property
    def traits(self) -> Traits: ...

    def info_url(self, coordinates: Coordinates) -> str: ...

    def learn(self, coordinates: Coordinates, answer: bytes) -> Coordinates: ...


class Discovery:
    """Reads the pages of engines, and enters what they report in the fleet.

    Arguments:
        probe: fetches the pages.
        seconds: the time limit of a page.
        connectors: by name.
    """

    def __init__(self, fleet: Fleet, probe: Probe, seconds: float, connectors: Mapping[str, CoordinatesReader]) -> None:
        self._fleet = fleet
        self._probe = probe
        self._seconds = seconds
        self._connectors = connectors
        self._from_settings: dict[Backend, Coordinates] = {}  # the coordinates in the settings

    def forget(self, backend: Backend) -> None:
        """Forget a backend that has left the fleet."""
        self._from_settings.pop(backend, None)

    async def profile(self, backend: Backend) -> Profile:
        """Read how an engine was started, as far as it reports that."""
        configuration = b""
        for page in CONFIGURATION:
            if configuration := await self._probe.page(backend.url + page, _CONFIGURATION_TIMEOUT):
                break
        path = backend.kind.metrics
        metrics = await self._probe.page(backend.url + path, self._seconds) if path else b""
        profile = read_profile(configuration, metrics)
        contexts = [card.get("max_model_len") for card in (backend.models or {}).values()]
        known = [context for context in contexts if isinstance(context, int) and context > 0]
        return msgspec.structs.replace(profile, context=min(known)) if known else profile

    async def read_cache(self, backend: Backend) -> None:
        """Read how much an engine's KV cache holds. An engine that does not report it may be used all the same."""
        path = backend.kind.metrics
        if backend.role != "encode":
            metrics = await self._probe.page(backend.url + path, self._seconds) if path else b""
            self._fleet.set_cache(backend, read_cache(metrics))

    async def read_from_elsewhere(self, backend: Backend) -> int | None:
        """How many prompt tokens an engine has loaded from other engines' KV caches; None if it does not report it."""
        path = backend.kind.metrics
        return read_from_elsewhere(await self._probe.page(backend.url + path, self._seconds)) if path else None

    async def learn(self, backend: Backend, *, anew: bool = False) -> None:
        """Read the models, the version, the hand-off protocol and the coordinates. An engine that lacks the page of
        models or of the version may be used all the same.

        Arguments:
            anew: the engine may be another one than before.
        Raises:
            ProbeFailed: the backend should get no requests.
        """
        backend.lacks.clear()
        models = await self.models(backend)
        version = ""
        path, member = backend.kind.version
        if path and (answer := await self._probe.get(backend, path)).status != 404:
            version = backend.version
            if answer.status == 200:
                with suppress(*NOT_AS_EXPECTED):
                    version = str(decode_json(answer.body)[member])
        self._fleet.set_models(backend, models, version)
        if self._fleet.reports_connector(backend) and (anew or not backend.reported_connector):
            self._fleet.connector_reported(backend, await self._read_connector(backend))
        await self._locate(backend)

    async def _read_connector(self, backend: Backend) -> str:
        """The connector of the hand-off protocol that an engine speaks; empty if that is not known."""
        fingerprints = {name: connector.traits.fingerprints for name, connector in self._connectors.items()}
        for page in CONFIGURATION:
            if known := configured(await self._probe.page(backend.url + page, _CONFIGURATION_TIMEOUT)):
                return speaker(known, fingerprints)
        if path := backend.kind.metrics:
            series = counted(await self._probe.page(backend.url + path, self._seconds))
            if name := speaker(series, fingerprints):
                return name
        return await self._connector_by_page(backend) if backend.role == "prefill" else ""

    async def _connector_by_page(self, backend: Backend) -> str:
        """The connector whose page about a prefill engine's coordinates the engine has; empty if it has none."""
        for name, connector in self._connectors.items():
            coordinates = msgspec.structs.replace(
                backend.coordinates, port=backend.coordinates.port or connector.traits.port
            )
            if url := connector.info_url(coordinates):
                with suppress(*NOT_AS_EXPECTED):
                    connector.learn(coordinates, await self._probe.page(url, self._seconds))
                    return name
        return ""

    async def models(self, backend: Backend) -> dict[str, dict[str, Any]] | None:
        """The models that a backend serves now; those that were known, if it does not report them."""
        answer = await self._probe.get(backend, "/v1/models")
        if answer.status in (401, 403):
            raise ProbeFailed(f"/v1/models answered {answer.status}: set backend_api_key", "key_refused")
        if answer.status == 200:
            with suppress(*NOT_AS_EXPECTED):
                return {str(card["id"]): dict(card) for card in decode_json(answer.body)["data"]}
        return backend.models

    async def _locate(self, backend: Backend) -> None:
        """Read the coordinates that the connector's legs need, unless the engine registers them by itself.

        Raises:
            ProbeFailed: the engine did not report them, so that no hand-off is possible.
        """
        connector = self._connectors.get(backend.connector)
        if (
            connector is not None
            and connector.traits.registers
            and backend.role in ("prefill", "decode")
            and not backend.registered
        ):
            raise ProbeFailed("its engine has not registered at zmq.registrations", "unregistered")
        if connector is None or backend.role != "prefill":
            return
        from_settings = self._from_settings.setdefault(backend, backend.coordinates)
        if not from_settings.port:
            from_settings = msgspec.structs.replace(from_settings, port=connector.traits.port)
        if not backend.coordinates.port:
            backend.locate(from_settings)
        urls = [backend.url + page for page in connector.traits.info_pages] or [connector.info_url(from_settings)]
        if not urls[0]:
            return
        for url in urls:
            try:
                answer = await self._probe.fetch(url, url)
            except ProbeFailed as failure:
                raise ProbeFailed(str(failure), "no_coordinates") from failure
            if answer.status != 404:
                break
        try:
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            backend.locate(connector.learn(from_settings, answer.body))
        except NOT_AS_EXPECTED as error:
            raise ProbeFailed(f"{url} did not report where its KV cache is: {error}", "no_coordinates") from None
