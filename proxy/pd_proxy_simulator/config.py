"""The settings of a simulated engine, in one frozen value. No other module of this package reads flags or the
environment.

Invariant: a configuration that exists is consistent (checked once, in `__post_init__`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["generate", "embed", "classify", "transcribe", "moderate", "any"]
Surface = Literal["vllm", "nim", "openai"]
Role = Literal["prefill", "decode", "mixed", "encode"]
EncoderConnector = Literal["none", "example", "cpu"]
Connector = Literal[
    "nixl",
    "mooncake_ascend",
    "mooncake",
    "ascend_layerwise",
    "lmcache_pd",
    "moriio_read",
    "moriio_write",
    "p2p_nccl",
    "sglang",
    "tensorrt_llm",
    "nixl_push",
    "offload_p2p",
    "shared_cache",
    "none",
]

# How long each connector pins a hand-off when nothing is set: kv_lease_duration, and the Ascend abort timeout.
# A real decode engine with ascend_layerwise waits for ever; a simulated one gives up after this time.
DEFAULT_LEASE = {
    "nixl": 30.0,
    "mooncake_ascend": 480.0,
    "mooncake": 480.0,
    "ascend_layerwise": 480.0,
    "lmcache_pd": 60.0,  # allocation_timeout_sec and the like bound a transfer; nothing is kept after it
    "moriio_read": 60.0,  # defer_timeout
    "moriio_write": 60.0,
    "p2p_nccl": 60.0,  # the real one has no limit: this is how long decode waits
    "sglang": 300.0,
    "tensorrt_llm": 60.0,
    "nixl_push": 30.0,
    "offload_p2p": 60.0,
    "shared_cache": 0.0,
    "none": 0.0,
}


@dataclass(frozen=True, slots=True)
class SimulatorConfig:
    """Settings of one simulated engine. Times are in seconds, rates in tokens a second; 0 means "as fast as
    possible"."""

    role: Role = "mixed"  # a label, as in vLLM: the request's own parameters say which leg it is
    host: str = "127.0.0.1"  # loopback: a simulator serves its own machine only
    port: int = 0  # 0: any free port
    side_port: int = 0  # the port where hand-offs are pulled from; 0: any free port
    side_host: str = ""  # the name of this host in hand-offs; "": host, or localhost (as vLLM) if host is a wildcard
    proxy: str = ""  # host:port of the gateway's ZeroMQ socket, for connectors whose engines send it messages
    register_every: float = 3.0  # seconds between registrations, for connectors whose engines register at the gateway
    tp: int = 1  # tensor-parallel ranks, as far as a connector reports each
    model: str = "sim"
    task: Task = "generate"  # what the model is for: as in vLLM, the routes of other tasks do not exist
    surface: Surface = "vllm"  # whose paths it serves for health, metrics and version
    dev_mode: bool = True  # VLLM_SERVER_DEV_MODE: the cache can be reset, and the engine can be put to sleep
    profiler: bool = True  # a profiler is configured
    root: str = ""  # the path that the model was loaded from; "": its name
    version: str = "0.32.0"  # what /version says
    adapters: tuple[str, ...] = ()  # LoRA adapters that are loaded at the start
    step_time: float = 0.0  # one decode step for the whole batch; 0 keeps tests fast
    prefill_rate: float = 0.0  # prompt tokens a second
    transfer_rate: float = 0.0  # pulled tokens a second
    blocks: int = 8192  # 131,072 tokens: some hundreds of ordinary requests
    block_size: int = 16  # vLLM's default on GPUs
    max_num_seqs: int = 256  # vLLM's default
    max_num_batched_tokens: int = 8192  # a longer prefill is done in several steps, between which others decode
    max_model_len: int = 32768
    max_queued: int = 0  # 0: the queue is unbounded
    lease: float | None = None  # None: the connector's own (nixl 30, mooncake_ascend 480)
    handshake_timeout: float = 5.0  # as measured; tests want it small
    connector: Connector = "nixl"
    encoder_connector: EncoderConnector = "none"
    encoder_storage: str = ""  # where encoders of kind example store their embeddings: shared_storage_path
    encode_time: float = 0.0  # seconds for which one medium is encoded
    shared_path: str = ""  # the folder of shared_cache
    load_failure_policy: Literal["fail", "recompute"] = "fail"  # vLLM's default
    preemption: Literal["recompute", "report"] = "recompute"  # report: vllm-ascend's stop_reason "recomputed"
    stale_reads: Literal["wrong", "memory"] = "wrong"  # memory: wrong only once the blocks have been reused
    eos_rate: float = 1 / 512  # probability of the end-of-sequence token at each draw
    prefix_caching: bool = True
    kv_events: int | None = None  # port at which changes of the prefix cache are published; 0: any free one
    kv_replay: int = 0  # port that replays missed batches; 0: any free one
    kv_events_topic: str = ""
    kv_events_encoding: Literal["map", "array"] = "map"  # array: vLLM before 2026, and SGLang
    kv_events_hashes: Literal["int", "bytes"] = "int"  # VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES
    kv_events_buffer: int = 10_000  # batches kept for subscribers that missed some, as vLLM's buffer_steps
    responses_store: bool = False  # VLLM_ENABLE_RESPONSES_API_STORE
    scale_out: bool = False  # --enable-scale-out: tokens in, tokens out
    prompt_tokens_details: bool = True  # whether usage has cached_tokens
    written_tokens: bool = False  # whether usage has the tokens that were written to the cache (vLLM since 9/2026)
    handoff_cached: bool = True  # whether a hand-off has the number of cached prompt tokens (not in vLLM before 9/2026)
    parser: bool = False  # --reasoning-parser or --tool-call-parser: a token without text has no content in its delta
    # --shutdown-timeout: seconds for which requests may run on after SIGTERM; 0 aborts them
    shutdown_timeout: float = 0.0
    exit_delay: float = 0.17  # seconds from SIGTERM until the port is closed, where requests are aborted
    death_delay: float = 0.3  # seconds for which a dead engine answers /health with 503 before its process ends
    keep_alive: float = 5.0  # VLLM_HTTP_TIMEOUT_KEEP_ALIVE
    request_log: int = 256  # received requests that are kept for tests to read
    api_key: str | None = None
    handoff_key: str | None = None  # tensorrt_llm: the key by which a generation server's parameters must be signed
    weights: int = 0  # engines with other weights generate other text

    def __post_init__(self) -> None:
        """Refuse settings with which no engine could run."""
        for name in (
            "step_time",
            "prefill_rate",
            "transfer_rate",
            "max_queued",
            "handshake_timeout",
            "shutdown_timeout",
            "exit_delay",
            "death_delay",
            "register_every",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "tp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if (self.encoder_connector == "example") != bool(self.encoder_storage):
            raise ValueError("encoder_storage goes with the encoder connector example, and only with it")
        if self.role == "encode" and self.encoder_connector == "none":
            raise ValueError("an encoder needs an encoder connector")
        if not 0 <= self.eos_rate < 1:
            raise ValueError(f"eos_rate must be in [0, 1), got {self.eos_rate}")
        if self.lease is not None and self.lease <= 0:
            raise ValueError(f"lease must be positive, got {self.lease}")
        if self.connector == "shared_cache" and not self.shared_path:
            raise ValueError("shared_cache needs shared_path, the folder that its engines share")

    @property
    def context(self) -> int:
        """The longest sequence in tokens: vLLM does not start with a context that its KV cache cannot hold."""
        return min(self.max_model_len, self.blocks * self.block_size)

    @property
    def advertised_host(self) -> str:
        """The name of this host in hand-offs (`remote_host`)."""
        return self.side_host or ("localhost" if self.host in ("0.0.0.0", "::", "") else self.host)  # noqa: S104

    @property
    def lease_seconds(self) -> float:
        """How many seconds a hand-off is pinned unless its lease is renewed."""
        return DEFAULT_LEASE[self.connector] if self.lease is None else self.lease
