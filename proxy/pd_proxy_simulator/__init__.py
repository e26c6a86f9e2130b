"""Simulates a vLLM engine, its HTTP surface and its timing, without a model or a GPU. The gateway's failure handling is
tested against it.

    sim = Simulator(SimulatorConfig(role="prefill"))
    await sim.start()                  # listens on sim.url
    sim.faults.add("status", status=503, count=2)
    await sim.wait_for(lambda: sim.engine.running == 1)
    sim.kill()
"""

from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.engine_process import ReceivedRequest
from pd_proxy_simulator.faults import Fault, Faults
from pd_proxy_simulator.server import Simulator

__all__ = ["Fault", "Faults", "ReceivedRequest", "Simulator", "SimulatorConfig"]
