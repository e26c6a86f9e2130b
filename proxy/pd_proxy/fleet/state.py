"""The states of a backend, and what leads from one to another.

A backend has three kinds of state, since each changes without the others: its health, as probes and requests find it;
its duty, as operators set it; and for each leg its fitness, as the outlier detector decides. It may be given a request
when its health is `UP`, its duty is `SERVING`, and it is `FIT` for the leg, or so few are fit that ejections are
ignored. `docs/states.svg` is drawn from these tables.
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
    """It ends what it has and is given nothing new."""
    LEAVING = "leaving"
    """It is draining, and forgotten when nothing needs it any more."""
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
