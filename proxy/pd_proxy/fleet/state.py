"""The states of a backend, and the transitions between them.

A backend has three independent states: its health, which probes and requests determine; its duty, which operators set;
and its fitness for each kind of leg, which the outlier detector decides. A backend may be given a request when its
health is `UP`, its duty is `SERVING`, and it is `FIT` for the leg. Its fitness is ignored where too few backends are
fit. `docs/states.svg` is drawn from these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Health(Enum):
    """Whether the engine is alive, as far as is known."""

    UNPROBED = "unprobed"
    UP = "up"
    DOWN = "down"


class Duty(Enum):
    """What the backend is to do."""

    SERVING = "serving"
    DRAINING = "draining"
    """It finishes its requests and gets no new ones."""
    LEAVING = "leaving"
    """It is draining, and is removed when it is drained."""
    GONE = "gone"


class Fitness(Enum):
    """Whether the backend does one kind of leg as well as its pool."""

    FIT = "fit"
    EJECTED = "ejected"


class Event(Enum):
    """What changes a state."""

    PROBE_OK = "probe ok"
    PROBE_FAILED = "probe failed"
    UNREACHABLE = "unreachable"
    """A request could not connect to it."""
    EXPIRED = "registration expired"
    ASLEEP = "put to sleep"
    CONNECTOR_CHANGED = "connector changed"
    """It speaks another hand-off protocol than before, and has to be asked for its coordinates."""
    DRAIN = "drain"
    UNDRAIN = "undrain"
    REMOVE = "remove"
    FORGET = "forget"
    EJECT = "eject"
    RETURN = "ejection over"
    RESTART = "came up"


_OUT = dict.fromkeys(
    (Event.PROBE_FAILED, Event.UNREACHABLE, Event.EXPIRED, Event.ASLEEP, Event.CONNECTOR_CHANGED), Health.DOWN
)
HEALTH: Mapping[Health, Mapping[Event, Health]] = {
    Health.UNPROBED: {Event.PROBE_OK: Health.UP, **_OUT},
    Health.UP: {Event.PROBE_OK: Health.UP, **_OUT},
    Health.DOWN: {Event.PROBE_OK: Health.UP, **_OUT},
}
DUTY: Mapping[Duty, Mapping[Event, Duty]] = {
    Duty.SERVING: {Event.DRAIN: Duty.DRAINING, Event.UNDRAIN: Duty.SERVING, Event.REMOVE: Duty.LEAVING},
    Duty.DRAINING: {Event.DRAIN: Duty.DRAINING, Event.UNDRAIN: Duty.SERVING, Event.REMOVE: Duty.LEAVING},
    Duty.LEAVING: {
        Event.DRAIN: Duty.LEAVING,
        Event.UNDRAIN: Duty.SERVING,
        Event.REMOVE: Duty.LEAVING,
        Event.FORGET: Duty.GONE,
    },
    Duty.GONE: {},
}
FITNESS: Mapping[Fitness, Mapping[Event, Fitness]] = {
    Fitness.FIT: {Event.EJECT: Fitness.EJECTED, Event.RESTART: Fitness.FIT},
    Fitness.EJECTED: {
        Event.EJECT: Fitness.EJECTED,  # for a longer time
        Event.RETURN: Fitness.FIT,
        Event.RESTART: Fitness.FIT,
    },
}
