"""Callbacks for changes of the fleet."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict, Unpack

from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.health.kv_cache import Cache

OnBackend = Callable[[Backend], object]


class Callbacks(TypedDict, total=False):
    """The callbacks of one listener, each for one kind of change.

    Attributes:
        on_join: a backend was added to the fleet.
        on_leave: a backend was removed from it.
        on_up: a backend has come up.
        on_fit: the possible pairs of a backend that is up may have changed.
        on_cache: an engine has reported what its KV cache holds.
        on_lost_cache: an engine's prefix cache is empty.
    """

    on_join: OnBackend
    on_leave: OnBackend
    on_up: OnBackend
    on_fit: OnBackend
    on_cache: Callable[[Backend, Cache], object]
    on_lost_cache: OnBackend


class Listeners:
    """The listeners of one fleet, in the order in which they have subscribed."""

    def __init__(self) -> None:
        self._all: list[Callbacks] = []

    def __len__(self) -> int:
        return len(self._all)

    def subscribe(self, **callbacks: Unpack[Callbacks]) -> Callable[[], None]:
        """Add callbacks. Returns a function that removes them."""
        self._all.append(callbacks)

        def unsubscribe() -> None:
            self._all = [one for one in self._all if one is not callbacks]

        return unsubscribe

    def join(self, backend: Backend) -> None:
        for one in tuple(self._all):
            if "on_join" in one:
                one["on_join"](backend)

    def leave(self, backend: Backend) -> None:
        for one in tuple(self._all):
            if "on_leave" in one:
                one["on_leave"](backend)

    def up(self, backend: Backend) -> None:
        for one in tuple(self._all):
            if "on_up" in one:
                one["on_up"](backend)

    def fit(self, backend: Backend) -> None:
        for one in tuple(self._all):
            if "on_fit" in one:
                one["on_fit"](backend)

    def cache(self, backend: Backend, cache: Cache) -> None:
        for one in tuple(self._all):
            if "on_cache" in one:
                one["on_cache"](backend, cache)

    def lost_cache(self, backend: Backend) -> None:
        for one in tuple(self._all):
            if "on_lost_cache" in one:
                one["on_lost_cache"](backend)
