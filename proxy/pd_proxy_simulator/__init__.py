"""A vLLM engine on the wire and in time, without a model or a GPU, to test the gateway's failure handling against.

sim = Simulator(SimulatorConfig(role="prefill"))
await sim.start()                  # listens on sim.url
sim.faults.add("status", status=503, count=2)
await sim.wait_for(lambda: sim.engine.running == 1)
sim.kill()
"""

from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.faults import Fault, Faults
from pd_proxy_simulator.routes import ReceivedRequest
from pd_proxy_simulator.server import Simulator

__all__ = ["Fault", "Faults", "ReceivedRequest", "Simulator", "SimulatorConfig"]
