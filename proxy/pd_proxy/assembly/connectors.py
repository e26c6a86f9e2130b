"""The connectors of a gateway, and the properties of those that its groups of backends use."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from pd_proxy.fleet.protocols import AUTO
from pd_proxy.handoff.connector import UNKNOWN, Connector
from pd_proxy.handoff.connectors.registry import connectors
from pd_proxy.handoff.traits import Traits
from pd_proxy.requests.endpoints import LAYOUTS, Endpoint
from pd_proxy.settings.tree import Settings


class Connectors(msgspec.Struct, frozen=True):
    """Every connector, and the names of those that groups of backends use.

    Attributes:
        by_name: every connector, also those that no group uses.
        configured: the connectors of the groups; `auto` and names that are unknown among them.
    """

    by_name: Mapping[str, Connector]
    configured: frozenset[str]

    @property
    def in_use(self) -> list[Connector]:
        """The connectors that backends of this gateway may speak."""
        return [one for name, one in self.by_name.items() if name in self.configured or AUTO in self.configured]

    @property
    def plain_decode(self) -> frozenset[str]:
        """The names of the connectors whose decode engines answer a request without a hand-off correctly."""
        return frozenset(name for name, connector in self.by_name.items() if connector.traits.plain_decode)

    @property
    def called_back(self) -> bool:
        """Whether engines of some group call the gateway during a hand-off."""
        return any(self.traits(name).called_back for name in self.configured)

    @property
    def own_paths(self) -> frozenset[str]:
        """The paths of the generating routes that only engines of one family have, where a group has such engines.

        A group's `kind` does not always tell: a group without one counts as vLLM's. Its connector does.
        """
        endpoints = {endpoint for name in self.configured for endpoint in self.traits(name).endpoints}
        return frozenset(LAYOUTS[endpoint].path for endpoint in endpoints if LAYOUTS[endpoint].of_one_family)

    def traits(self, name: str) -> Traits:
        """The constants of a connector; those of `UNKNOWN` for a name that no connector has."""
        return self.by_name.get(name, UNKNOWN).traits


def make_connectors(settings: Settings) -> Connectors:
    """Make the connectors, with the key for those that sign hand-offs."""
    key = settings.handoff_key
    return Connectors(
        connectors("" if key is None else key.get_secret_value()),
        frozenset(group.connector for group in settings.all_groups()),
    )


def is_served(endpoint: Endpoint, settings: Settings) -> bool:
    """Whether the gateway serves an endpoint: some need a setting, or engines of one family."""
    if endpoint == "generate":
        return settings.routes.generate
    if endpoint == "sglang_generate":
        groups = settings.all_groups()
        return any(group.kind == "sglang" or group.connector in ("sglang", AUTO) for group in groups)
    return True
