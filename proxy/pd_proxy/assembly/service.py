"""The parts that serve the requests of clients."""

from __future__ import annotations

import random
from math import inf
from secrets import token_bytes

import msgspec

from pd_proxy.admission.admission import Admission
from pd_proxy.admission.gate import Gate
from pd_proxy.api.credentials import Credentials
from pd_proxy.api.entrance import Entrance
from pd_proxy.assembly.connectors import Connectors
from pd_proxy.assembly.engines import EngineClients
from pd_proxy.assembly.placement import Placement
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.model_names import Names
from pd_proxy.flow.callbacks import Callbacks
from pd_proxy.flow.capacity import FleetCapacity
from pd_proxy.flow.flow import Flow
from pd_proxy.flow.single import Single
from pd_proxy.flow.stored_responses import StoredResponses
from pd_proxy.flow.suspicion import Suspicion
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.records import Telemetry
from pd_proxy.workers.context import WorkerContext


class Service(msgspec.Struct, frozen=True):
    """The parts that clients' requests pass, from the entrance to the answer.

    Attributes:
        credentials: checks keys.
        names: translates the names of models.
        entrance: what requests pass before they are placed.
        flow: serves the requests that generate.
        single: serves the requests of the one-leg routes.
        suspicion: finds requests that engines die of.
        stored: names stored responses by the backends that have them.
    """

    credentials: Credentials
    names: Names
    entrance: Entrance
    flow: Flow
    single: Single
    suspicion: Suspicion
    stored: StoredResponses


def make_admission(settings: Settings, fleet: Fleet) -> tuple[Gate, Admission]:
    """Make the gate and admission. Admission checks the capacity of the backends where that is bounded."""
    gate = Gate()
    admission = Admission(settings, FleetCapacity(fleet) if fleet.bounded else None)
    gate.on_close = admission.close
    if fleet.bounded:
        fleet.watch_capacity(admission.recheck)
    return gate, admission


def make_service(
    settings: Settings,
    fleet: Fleet,
    gate: Gate,
    admission: Admission,
    connectors: Connectors,
    placement: Placement,
    engines: EngineClients,
    telemetry: Telemetry,
    callbacks: Callbacks,
    context: WorkerContext | None,
) -> Service:
    """Make these parts."""
    legs = engines.legs
    suspicion = Suspicion(settings.retries.after_cut, engines.prober.lives)
    flow = Flow(
        settings,
        fleet,
        legs,
        connectors.by_name,
        placement.placing,
        placement.first_tokens,
        telemetry,
        random.random,
        callbacks,
        suspicion,
    )
    credentials = Credentials(settings)
    names = Names(settings, fleet, engines.prober.ask_models)
    entrance = Entrance(
        gate,
        admission,
        credentials,
        names,
        telemetry,
        legs.hops,
        body_limit=settings.limits.request_body,
        body_seconds=settings.timeouts.request_body,
        total=settings.timeouts.total or inf,
        queue_timeout=settings.admission.queue_timeout,
    )
    single = Single(settings, fleet, legs, random.random, suspicion)
    stored = StoredResponses(_shared_secret(settings, context))
    return Service(credentials, names, entrance, flow, single, suspicion, stored)


def _shared_secret(settings: Settings, context: WorkerContext | None) -> bytes:
    """A secret that the gateways of one operator share and no client knows: keys of the settings. Without such keys,
    one that the workers of this gateway share."""
    secrets = [key.get_secret_value() for key in (settings.admin_key, settings.backend_api_key) if key is not None]
    if secrets:
        return "\0".join(secrets).encode()
    return token_bytes(32) if context is None else str(context.directory).encode()
