"""Kinds of backend: where each says how it is, what it offers to clients, and what it lets operators do.

Plain data. A route that is on no list of a gateway's backends does not exist there, so that nothing else an engine
happens to serve (vLLM's `/collective_rpc`, for one) can be reached through the gateway. That a route
is on the list does not mean that each engine has it: which of vLLM's exist depends on the model, and an engine that has
one not says so when it is asked (`Backend.lacks`).
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
    """One kind of backend.

    Attributes:
        health: the path that answers 200 while the backend can take requests.
        metrics: the path of its Prometheus metrics, or empty.
        version: the path that names its version, and the member of the answer that does; empty where there is none.
        routes: paths of its that clients may use.
        operations: what operators may have it do, with the path for that; `POST`, but for `is_sleeping`.
        rests: the paths that say whether it is asleep or paused while its health is good, and the member that does.
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
        # It can release its memory too, but not say whether it has: nobody could tell that it must get no requests.
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
            metrics="/prometheus/metrics",  # its /metrics is JSON, and emptied by reading it
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
            health="/v1/models",  # all that OpenAI's API has to ask whether it lives
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
