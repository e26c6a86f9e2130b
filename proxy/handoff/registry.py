"""The connectors by the names that settings use. A new one is a file beside this and a line here."""

from __future__ import annotations

from proxy.handoff.connector import Connector
from proxy.handoff.mooncake import Mooncake
from proxy.handoff.mooncake_ascend import MooncakeAscend
from proxy.handoff.nixl import Nixl
from proxy.handoff.sglang import SGLang

_ALL: tuple[Connector, ...] = (
    Nixl(),
    MooncakeAscend(),
    Mooncake(),
    SGLang(),
)
CONNECTORS = {connector.name: connector for connector in _ALL}
