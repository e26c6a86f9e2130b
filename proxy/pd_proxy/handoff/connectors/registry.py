"""The connectors by their names in the settings. A new connector has a file of its own and a line here."""

from __future__ import annotations

from pd_proxy.handoff.connector import Connector
from pd_proxy.handoff.connectors.ascend_layerwise import AscendLayerwise
from pd_proxy.handoff.connectors.lmcache_pd import LMCachePD
from pd_proxy.handoff.connectors.mooncake import Mooncake
from pd_proxy.handoff.connectors.mooncake_ascend import MooncakeAscend
from pd_proxy.handoff.connectors.moriio import MoRIIORead, MoRIIOWrite
from pd_proxy.handoff.connectors.nixl import Nixl
from pd_proxy.handoff.connectors.nixl_push import NixlPush
from pd_proxy.handoff.connectors.offload_p2p import OffloadP2P
from pd_proxy.handoff.connectors.p2p_nccl import P2pNccl
from pd_proxy.handoff.connectors.sglang import SGLang
from pd_proxy.handoff.connectors.shared_cache import SharedCache
from pd_proxy.handoff.connectors.tensorrt_llm import TensorRTLLM

_ALL: tuple[Connector, ...] = (
    Nixl(),
    MooncakeAscend(),
    Mooncake(),
    AscendLayerwise(),
    LMCachePD(),
    MoRIIORead(),
    MoRIIOWrite(),
    P2pNccl(),
    SGLang(),
    TensorRTLLM(),
    NixlPush(),
    OffloadP2P(),
    SharedCache(),
)
CONNECTORS = {connector.name: connector for connector in _ALL}


def connectors(handoff_key: str) -> dict[str, Connector]:
    """The connectors for a gateway whose engines require hand-offs that are signed with a shared key."""
    return {**CONNECTORS, TensorRTLLM.traits.name: TensorRTLLM(handoff_key)}
