"""What an engine reports of itself: the /metrics page under vLLM's names, and the simulator's own state as JSON.

Invariant: reading changes nothing.
"""

from __future__ import annotations

from typing import Any

from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.engine import Engine
from pd_proxy_simulator.engine_process import EngineProcess
from pd_proxy_simulator.metrics import Exposition

_CLASSES = {"nixl": "NixlConnector", "mooncake": "MooncakeConnector", "mooncake_ascend": "MooncakeConnectorV1"}
"""The connectors by the names of vLLM's classes."""

_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}


def server_info(config: SimulatorConfig) -> dict[str, Any]:
    """vLLM's answer at /server_info?config_format=json in development mode, as far as the simulator has it."""
    name = _CLASSES.get(config.connector)
    role = _ROLES.get(config.role, "kv_both")
    transfer = None if name is None else {"kv_connector": name, "kv_role": role, "kv_connector_extra_config": {}}
    said = {
        "model_config": {"model": config.root or config.model, "max_model_len": config.context},
        "parallel_config": {"tensor_parallel_size": config.tp},
        "kv_transfer_config": transfer,
    }
    return {"vllm_config": said, "vllm_env": {}, "system_env": {}}


def metrics_page(engine: Engine) -> str:
    """Prometheus text."""
    config, stats = engine.config, engine.stats
    usable = max(config.blocks - 1, 1)
    page = Exposition(f'engine="0",model_name="{config.model}"')
    page.gauge("vllm:num_requests_running", engine.running)
    page.gauge("vllm:num_requests_waiting", engine.waiting)
    deferred = engine.loading
    page.gauge("vllm:num_requests_waiting_by_reason", engine.waiting - deferred, 'reason="capacity"')
    page.gauge("vllm:num_requests_waiting_by_reason", deferred, 'reason="deferred"')
    page.gauge("vllm:kv_cache_usage_perc", engine.used_blocks / usable)
    page.gauge("vllm:engine_sleep_state", 1, 'sleep_state="awake"')
    page.gauge(
        "vllm:cache_config_info",
        1,
        f'block_size="{config.block_size}",num_gpu_blocks="{config.blocks}",'
        f'enable_prefix_caching="{config.prefix_caching}",cache_dtype="auto"',
    )
    page.counter("vllm:prefix_cache_queries", stats.prefix_queries)
    page.counter("vllm:prefix_cache_hits", stats.prefix_hits)
    page.counter("vllm:external_prefix_cache_queries", stats.external_queries)
    page.counter("vllm:external_prefix_cache_hits", stats.external_hits)
    page.counter("vllm:num_preemptions", stats.preemptions)
    page.counter("vllm:prompt_tokens", stats.prompt_tokens)
    by_source = {
        "local_compute": stats.local_compute,
        "local_cache_hit": stats.local_cache_hit,
        "external_kv_transfer": stats.external_kv_transfer,
    }
    page.counter("vllm:prompt_tokens_by_source", {key: float(n) for key, n in by_source.items()}, "source")
    page.counter("vllm:prompt_tokens_cached", stats.local_cache_hit + stats.external_kv_transfer)
    page.counter("vllm:generation_tokens", stats.generation_tokens)
    page.counter("vllm:request_success", {key: float(n) for key, n in stats.finished.items()}, "finished_reason")
    page.counter("vllm:admission_rejections", {"queue_full": float(stats.admission_rejections)}, "reason")
    page.histogram("vllm:time_to_first_token_seconds", stats.time_to_first_token)
    page.histogram("vllm:inter_token_latency_seconds", stats.inter_token_latency)
    page.histogram("vllm:e2e_request_latency_seconds", stats.end_to_end)
    page.histogram("vllm:request_queue_time_seconds", stats.queue_time)
    page.histogram("vllm:request_prompt_tokens", stats.prompt_length)
    page.histogram("vllm:request_generation_tokens", stats.output_length)
    if config.connector == "nixl":
        page.histogram("vllm:nixl_xfer_time_seconds", stats.transfer_time)
        page.counter("vllm:nixl_num_failed_transfers", stats.failed_transfers)
        page.counter("vllm:nixl_num_failed_notifications", stats.failed_notifications)
        page.counter("vllm:nixl_num_kv_expired_reqs", engine.handoffs.expired)
        page.counter("vllm:nixl_num_notifications_after_expiry", engine.handoffs.late_notifications)
    return page.text()


def state(simulator: EngineProcess) -> dict[str, Any]:
    """The answer of /simulator/state."""
    engine = simulator.engine
    stats, handoffs = engine.stats, engine.handoffs
    return {
        "role": simulator.config.role,
        "engine_id": engine.id,
        "dead": engine.dead,
        "running": engine.running,
        "waiting": engine.waiting,
        "loading": engine.loading,
        "used_blocks": engine.used_blocks,
        "stranded_blocks": engine.stranded_blocks,
        "handoffs": len(handoffs),
        "handoffs_pinned": handoffs.pinned_total,
        "handoffs_pulled": handoffs.pulled,
        "handoffs_released_unread": handoffs.released_unread,
        "handoffs_expired": handoffs.expired,
        "lease_renewals": handoffs.renewals,
        "late_notifications": handoffs.late_notifications,
        "pulls": stats.pulls,
        "failed_transfers": stats.failed_transfers,
        "aborted": stats.aborted,
        "preemptions": stats.preemptions,
        "steps": stats.steps,
        "generation_tokens": stats.generation_tokens,
        "requests_served": simulator.served,
        "connections": len(simulator.connections),
        "probes": dict(simulator.probes),
    }
