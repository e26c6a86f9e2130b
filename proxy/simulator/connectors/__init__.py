"""The connectors that a simulated engine may speak, by the names that its flags use."""

from __future__ import annotations

from proxy.simulator.connectors.mooncake import Mooncake
from proxy.simulator.connectors.pull import MooncakeAscend, Nixl
from proxy.simulator.connectors.sglang import SGLang
from proxy.simulator.connectors.side import Side
from proxy.simulator.connectors.tensorrt_llm import TensorRTLLM

SIDES: dict[str, type[Side]] = {
    "nixl": Nixl,
    "mooncake_ascend": MooncakeAscend,
    "mooncake": Mooncake,
    "sglang": SGLang,
    "tensorrt_llm": TensorRTLLM,
    "none": Side,
}
