"""A vLLM engine on the wire and in time, without a model or a GPU, to test the gateway's failure handling against.

sim = Simulator(SimulatorConfig(role="prefill"))
await sim.start()                  # listens on sim.url
sim.faults.add("status", status=503, count=2)
await sim.wait_for(lambda: sim.engine.running == 1)
sim.kill()
"""

from proxy.simulator.config import SimulatorConfig
from proxy.simulator.faults import Fault, Faults
from proxy.simulator.routes import ReceivedRequest
from proxy.simulator.server import Simulator

__all__ = ["Fault", "Faults", "ReceivedRequest", "Simulator", "SimulatorConfig"]
