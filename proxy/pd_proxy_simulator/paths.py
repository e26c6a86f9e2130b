"""The paths of a simulated engine, by the engine's task and by the server that it imitates."""

from __future__ import annotations

from pd_proxy_simulator.config import SimulatorConfig

PROBES = {
    "vllm": {"/health": "health", "/ping": "health", "/metrics": "metrics", "/version": "version"},
    "nim": {
        "/v1/health/live": "live",
        "/v1/health/ready": "health",
        "/v1/metrics": "metrics",
        "/v1/version": "release",
    },
    "openai": {},
}
GENERATING = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
    "/inference/v1/generate",
}
BATCH = "/v1/chat/completions/batch"
RENDER = {f"{path}/render" for path in GENERATING - {"/inference/v1/generate"}}
_GENERATE = {*GENERATING, BATCH, *RENDER, "/v1/messages/count_tokens"}
SGLANGS_OWN = "/generate"
_SCORE = {"/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"}
_TASKS = {
    "generate": _GENERATE,
    "embed": {"/v1/embeddings", "/pooling", *_SCORE},
    "classify": {"/classify", "/pooling", *_SCORE},
    "transcribe": {"/v1/audio/transcriptions", "/v1/audio/translations"},
    "moderate": {"/v1/moderations"},
}
_TASKS["any"] = set().union(*_TASKS.values())
_POST = {"/tokenize", "/detokenize", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
DEVELOPMENT = {
    "/reset_prefix_cache": "POST",
    "/sleep": "POST",
    "/wake_up": "POST",
    "/is_sleeping": "GET",
    "/pause": "POST",
    "/resume": "POST",
    "/is_paused": "GET",
}
PROFILER = {"/start_profile": "POST", "/stop_profile": "POST"}


def known_paths(config: SimulatorConfig) -> dict[str, str]:
    """The paths that an engine with this configuration has, and the method of each."""
    known = dict.fromkeys(_TASKS[config.task] | _POST, "POST") | {"/v1/models": "GET"}
    if config.connector == "sglang":
        known[SGLANGS_OWN] = "POST"
    if config.surface == "vllm":
        known |= DEVELOPMENT if config.dev_mode else {}
        if config.dev_mode and config.connector not in ("sglang", "tensorrt_llm"):
            known["/server_info"] = "GET"  # vLLM's; other connectors' sides have pages of that name
        known |= PROFILER if config.profiler else {}
    return known
