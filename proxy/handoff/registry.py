"""The connectors by the names that settings use. A new one is a file beside this and a line here."""

from __future__ import annotations

from proxy.handoff.ascend_layerwise import AscendLayerwise
from proxy.handoff.connector import Connector
from proxy.handoff.lmcache_pd import LMCachePD
from proxy.handoff.mooncake import Mooncake
from proxy.handoff.mooncake_ascend import MooncakeAscend
from proxy.handoff.moriio import MoRIIORead, MoRIIOWrite
from proxy.handoff.nixl import Nixl
from proxy.handoff.p2p_nccl import P2pNccl

_ALL: tuple[Connector, ...] = (
    Nixl(),
    MooncakeAscend(),
    Mooncake(),
    AscendLayerwise(),
    LMCachePD(),
    MoRIIORead(),
    MoRIIOWrite(),
    P2pNccl(),
)
CONNECTORS = {connector.name: connector for connector in _ALL}
