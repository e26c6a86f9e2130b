"""The connectors by the names that settings use. A new one is a file beside this and a line here."""

from __future__ import annotations

from pd_proxy.handoff.ascend_layerwise import AscendLayerwise
from pd_proxy.handoff.connector import Connector
from pd_proxy.handoff.lmcache_pd import LMCachePD
from pd_proxy.handoff.mooncake import Mooncake
from pd_proxy.handoff.mooncake_ascend import MooncakeAscend
from pd_proxy.handoff.moriio import MoRIIORead, MoRIIOWrite
from pd_proxy.handoff.nixl import Nixl
from pd_proxy.handoff.nixl_push import NixlPush
from pd_proxy.handoff.offload_p2p import OffloadP2P
from pd_proxy.handoff.p2p_nccl import P2pNccl
from pd_proxy.handoff.sglang import SGLang
from pd_proxy.handoff.shared_cache import SharedCache
from pd_proxy.handoff.tensorrt_llm import TensorRTLLM

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
    """The same, for engines that want a hand-off signed with a key that they share with the gateway."""
    return {**CONNECTORS, TensorRTLLM.name: TensorRTLLM(handoff_key)}
