"""The connectors of a simulated engine, by the names that the flags use."""

from __future__ import annotations

from pd_proxy_simulator.connectors.ascend_layerwise import AscendLayerwise
from pd_proxy_simulator.connectors.lmcache_pd import LMCachePD
from pd_proxy_simulator.connectors.mooncake import Mooncake
from pd_proxy_simulator.connectors.moriio import MoRIIORead, MoRIIOWrite
from pd_proxy_simulator.connectors.nixl_push import NixlPush
from pd_proxy_simulator.connectors.offload_p2p import OffloadP2P
from pd_proxy_simulator.connectors.p2p_nccl import P2pNccl
from pd_proxy_simulator.connectors.pull import MooncakeAscend, Nixl
from pd_proxy_simulator.connectors.sglang import SGLang
from pd_proxy_simulator.connectors.shared_cache import SharedCache
from pd_proxy_simulator.connectors.side import Side
from pd_proxy_simulator.connectors.tensorrt_llm import TensorRTLLM

SIDES: dict[str, type[Side]] = {
    "nixl": Nixl,
    "mooncake_ascend": MooncakeAscend,
    "mooncake": Mooncake,
    "ascend_layerwise": AscendLayerwise,
    "lmcache_pd": LMCachePD,
    "moriio_read": MoRIIORead,
    "moriio_write": MoRIIOWrite,
    "p2p_nccl": P2pNccl,
    "sglang": SGLang,
    "tensorrt_llm": TensorRTLLM,
    "nixl_push": NixlPush,
    "offload_p2p": OffloadP2P,
    "shared_cache": SharedCache,
    "none": Side,
}
