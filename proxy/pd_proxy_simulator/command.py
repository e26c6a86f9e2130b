"""The command line: `pd-proxy simulate`, or `python -m pd_proxy_simulator`.

Invariant: SIGTERM (handled as vLLM does) and SIGINT end the command with exit status 0. An engine that died ends it
with status 1, as in vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable
from typing import Any

from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.connectors import SIDES
from pd_proxy_simulator.server import Simulator

_REAL_STEP = 0.02  # a token each 20 ms: an ordinary engine under load
_REAL_PREFILL = 20_000.0
_REAL_TRANSFER = 200_000.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the simulator's flags."""
    default = SimulatorConfig()
    _add_surface(parser.add_argument, default)
    _add_capacity(parser.add_argument, default)
    _add_connector(parser.add_argument, default)
    _add_cache(parser.add_argument, default)


def _add_surface(add: Callable[..., Any], default: SimulatorConfig) -> None:
    """Add the flags for what the engine is and where it listens."""
    add(
        "--role",
        choices=("prefill", "decode", "mixed", "encode"),
        default=default.role,
        help="the engine's role in its answers and registrations",
    )
    add("--host", default=default.host, help="address to listen on (%(default)s)")
    add("--port", type=int, default=8000, help="port of the API; 0 takes any free one (%(default)s)")
    add("--side-port", type=int, default=0, help="port where hand-offs are pulled from; 0 takes any free one")
    add("--side-host", default="", help="name of this host in hand-offs (as VLLM_NIXL_SIDE_CHANNEL_HOST)")
    add("--model", default=default.model, help="served model name (%(default)s)")
    tasks = ("generate", "embed", "classify", "transcribe", "moderate", "any")
    add("--task", choices=tasks, default=default.task, help="what the model is for (%(default)s)")
    surfaces = ("vllm", "nim", "openai")
    add("--surface", choices=surfaces, default=default.surface, help="whose health paths are served (%(default)s)")
    add("--no-dev-mode", action="store_true", help="no /reset_prefix_cache, /sleep and /wake_up")
    add("--no-profiler", action="store_true", help="no /start_profile and /stop_profile")
    add("--api-key", default=None, help="bearer token required on /v1")


def _add_capacity(add: Callable[..., Any], default: SimulatorConfig) -> None:
    """Add the flags for the engine's speed and capacity."""
    add("--step-time", type=float, default=_REAL_STEP, help="seconds for one decode step (%(default)s)")
    add("--prefill-rate", type=float, default=_REAL_PREFILL, help="prompt tokens/s; 0 is instant (%(default)s)")
    add("--transfer-rate", type=float, default=_REAL_TRANSFER, help="pulled tokens/s; 0 is instant (%(default)s)")
    add("--blocks", type=int, default=default.blocks, help="KV blocks (%(default)s)")
    add("--block-size", type=int, default=default.block_size, help="tokens in a block (%(default)s)")
    add("--max-num-seqs", type=int, default=default.max_num_seqs, help="sequences in a batch (%(default)s)")
    add(
        "--max-num-batched-tokens",
        type=int,
        default=default.max_num_batched_tokens,
        help="most tokens that a step computes (%(default)s)",
    )
    add("--max-model-len", type=int, default=default.max_model_len, help="longest sequence in tokens (%(default)s)")
    add("--max-queued", type=int, default=default.max_queued, help="queue bound; 0 is unbounded (%(default)s)")
    add(
        "--shutdown-timeout",
        type=float,
        default=default.shutdown_timeout,
        help="seconds for which requests may run on after SIGTERM; 0 aborts them (%(default)s)",
    )


def _add_connector(add: Callable[..., Any], default: SimulatorConfig) -> None:
    """Add the flags for hand-offs."""
    add("--lease", type=float, default=None, help="seconds for which a hand-off is kept (nixl 30, mooncake_ascend 480)")
    add("--handshake-timeout", type=float, default=default.handshake_timeout, help="seconds (%(default)s)")
    known = ", ".join(SIDES)
    add("--connector", choices=tuple(SIDES), metavar="NAME", default=default.connector, help=f"{known} (%(default)s)")
    add(
        "--encoder-connector",
        choices=("none", "example", "cpu"),
        default=default.encoder_connector,
        help="how media come from encoders (%(default)s)",
    )
    add(
        "--encoder-storage",
        default=default.encoder_storage,
        help="folder that engines with encoder connector example share",
    )
    add(
        "--encode-time",
        type=float,
        default=default.encode_time,
        help="seconds for which one medium is encoded (%(default)s)",
    )
    add("--proxy", default="", help="host:port of the gateway's ZeroMQ socket (as pd_proxy_host, proxy_ip)")
    add("--register-every", type=float, default=default.register_every, help="seconds (%(default)s)")
    add("--tp", type=int, default=default.tp, help="tensor-parallel ranks that a connector reports (%(default)s)")
    add("--shared-path", default=default.shared_path, help="folder that engines with shared_cache share")
    policies = ("fail", "recompute")
    add("--load-failure-policy", choices=policies, default=default.load_failure_policy, help="(%(default)s)")


def _add_cache(add: Callable[..., Any], default: SimulatorConfig) -> None:
    """Add the flags for the KV cache, its events, and the model's text."""
    add("--preemption", choices=("recompute", "report"), default=default.preemption, help="(%(default)s)")
    add("--stale-reads", choices=("wrong", "memory"), default=default.stale_reads, help="(%(default)s)")
    add(
        "--eos-rate",
        type=float,
        default=default.eos_rate,
        help="probability of the end-of-sequence token at each draw (%(default)s)",
    )
    add("--no-prefix-caching", action="store_true", help="compute every prompt in full")
    add("--kv-events", type=int, default=None, help="port to publish KV events at; 0 takes any free one; none: off")
    add("--kv-replay", type=int, default=0, help="port that replays missed KV events; 0 takes any free one")
    add("--kv-events-topic", default=default.kv_events_topic, help="(%(default)r)")
    add("--kv-events-encoding", choices=("map", "array"), default=default.kv_events_encoding, help="(%(default)s)")
    add(
        "--weights",
        type=int,
        default=default.weights,
        help="engines with different numbers are different models (%(default)s)",
    )


def config_from(args: argparse.Namespace) -> SimulatorConfig:
    """Returns the configuration that the flags describe. Raises ValueError."""
    return SimulatorConfig(
        role=args.role,
        host=args.host,
        port=args.port,
        side_port=args.side_port,
        side_host=args.side_host,
        proxy=args.proxy,
        register_every=args.register_every,
        tp=args.tp,
        model=args.model,
        task=args.task,
        surface=args.surface,
        dev_mode=not args.no_dev_mode,
        profiler=not args.no_profiler,
        api_key=args.api_key,
        step_time=args.step_time,
        prefill_rate=args.prefill_rate,
        transfer_rate=args.transfer_rate,
        blocks=args.blocks,
        block_size=args.block_size,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len,
        max_queued=args.max_queued,
        shutdown_timeout=args.shutdown_timeout,
        lease=args.lease,
        handshake_timeout=args.handshake_timeout,
        connector=args.connector,
        encoder_connector=args.encoder_connector,
        encoder_storage=args.encoder_storage,
        encode_time=args.encode_time,
        shared_path=args.shared_path,
        load_failure_policy=args.load_failure_policy,
        preemption=args.preemption,
        stale_reads=args.stale_reads,
        eos_rate=args.eos_rate,
        prefix_caching=not args.no_prefix_caching,
        kv_events=args.kv_events,
        kv_replay=args.kv_replay,
        kv_events_topic=args.kv_events_topic,
        kv_events_encoding=args.kv_events_encoding,
        weights=args.weights,
        request_log=1,  # the log cannot be read from outside this process, and prompts are long
    )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal arrives; returns the exit status."""
    try:
        config = config_from(args)
    except ValueError as error:
        sys.stderr.write(f"simulate: {error}\n")
        return 2
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_serve(config))
    except OSError as error:
        sys.stderr.write(f"simulate: cannot listen on {config.host}:{config.port}: {error}\n")
        return 1


async def _serve(config: SimulatorConfig) -> int:
    simulator = Simulator(config)
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, simulator.terminate)
    loop.add_signal_handler(signal.SIGINT, ending.set)
    await simulator.start()
    print(f"{config.role} engine {config.model!r} listening on {simulator.url}", flush=True)
    ended = asyncio.ensure_future(ending.wait())
    died = asyncio.ensure_future(simulator.wait_for(lambda: not simulator.alive, 10**9))
    await asyncio.wait((ended, died), return_when=asyncio.FIRST_COMPLETED)
    died.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await died
    if not ended.done():
        ended.cancel()
        if not simulator.stopping:
            return 1
        await simulator.wait_for(lambda: not simulator.connections, 10**9)  # the server waits for its clients to close
        return 0
    await simulator.stop()
    return 0


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: type[asyncio.AbstractEventLoop] = uvloop.Loop
    return factory
