"""The engine families: for each its health check, the routes for clients, and the operations for operators.

Plain data. A route that no engine family of a gateway's backends lists does not exist in that gateway. So nothing else
that an engine serves, such as vLLM's `/collective_rpc`, can be reached through the gateway. A listed route need not
exist in each engine: which routes vLLM has depends on the model. An engine that lacks one answers 404
(`Backend.lacks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pd_proxy.settings.types import KindName

Operation = Literal[
    "reset_prefix_cache",
    "start_profile",
    "stop_profile",
    "sleep",
    "wake_up",
    "is_sleeping",
    "load_lora_adapter",
    "unload_lora_adapter",
]

_GENERATE = ("/v1/chat/completions", "/v1/completions")
_MESSAGES = ("/v1/messages", "/v1/messages/count_tokens")
_AUDIO = ("/v1/audio/transcriptions", "/v1/audio/translations")
_TOKENS = ("/tokenize", "/detokenize")


@dataclass(frozen=True, slots=True)
class Kind:
    """An engine family.

    Attributes:
        name: its name in the settings (`kind`).
        health: the path that answers 200 while the backend can take requests.
        metrics: the path of its Prometheus metrics, or empty.
        version: the path whose answer has its version, and the member that is it; empty where there is none.
        routes: the paths that clients may use.
        operations: the operations for operators, and the path of each; all are `POST` but `is_sleeping`.
        rests: the paths whose answers say whether it is asleep or paused while its health check succeeds, and the
            member that says so.
    """

    name: KindName
    health: str
    routes: frozenset[str]
    metrics: str = ""
    version: tuple[str, str] = ("", "")
    operations: Mapping[Operation, str] = field(default_factory=dict)
    rests: Mapping[str, str] = field(default_factory=dict)


KINDS: dict[KindName, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "vllm",
            health="/health",
            metrics="/metrics",
            version=("/version", "version"),
            routes=frozenset(
                {
                    *_GENERATE,
                    *_MESSAGES,
                    *_AUDIO,
                    *_TOKENS,
                    *(f"{path}/render" for path in (*_GENERATE, "/v1/messages", "/v1/responses")),
                    "/v1/chat/completions/batch",
                    "/v1/responses",
                    "/inference/v1/generate",
                    "/v1/embeddings",
                    *("/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score"),
                    *("/pooling", "/classify"),
                }
            ),
            operations={
                "reset_prefix_cache": "/reset_prefix_cache",
                "start_profile": "/start_profile",
                "stop_profile": "/stop_profile",
                "sleep": "/sleep",
                "wake_up": "/wake_up",
                "is_sleeping": "/is_sleeping",
                "load_lora_adapter": "/v1/load_lora_adapter",
                "unload_lora_adapter": "/v1/unload_lora_adapter",
            },
            rests={"/is_sleeping": "is_sleeping", "/is_paused": "is_paused"},
        ),
        # It can release its memory too, but does not report that it has, so it would still be sent requests.
        Kind(
            "sglang",
            health="/health",
            metrics="/metrics",
            version=("/server_info", "version"),
            routes=frozenset(
                {
                    *_GENERATE,
                    *_MESSAGES,
                    *_AUDIO,
                    *_TOKENS,
                    "/generate",
                    "/v1/responses",
                    "/v1/embeddings",
                    *("/v1/rerank", "/v1/score", "/classify"),
                }
            ),
            operations={
                "reset_prefix_cache": "/flush_cache",
                "start_profile": "/start_profile",
                "stop_profile": "/stop_profile",
            },
        ),
        Kind(
            "tensorrt_llm",
            health="/health",
            metrics="/prometheus/metrics",  # its /metrics is JSON, and reading it clears it
            version=("/version", "version"),
            routes=frozenset({*_GENERATE, "/v1/responses"}),
        ),
        # nginx in the container answers /v1/health/live before there is a model; /v1/health/ready needs one.
        Kind(
            "nim",
            health="/v1/health/ready",
            metrics="/v1/metrics",
            version=("/v1/version", "release"),
            routes=frozenset({*_GENERATE, *_MESSAGES, *_TOKENS, "/v1/responses", "/v1/embeddings"}),
        ),
        Kind(
            "openai",
            health="/v1/models",  # OpenAI's API has no health check
            routes=frozenset(
                {
                    *_GENERATE,
                    *_AUDIO,
                    "/v1/responses",
                    "/v1/embeddings",
                    "/v1/moderations",
                    *("/rerank", "/v1/rerank"),
                }
            ),
        ),
    )
}
