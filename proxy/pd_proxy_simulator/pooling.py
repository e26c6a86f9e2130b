"""The answers of models that do not generate: embeddings, scores, ranks, classes, moderations.

Invariant: a vector is a pure function of the tokens and the engine's weights, so that two engines of one model agree.
"""

from __future__ import annotations

import base64
import json
import math
import struct
import uuid
from typing import Any

from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.errors import RequestError, bad_request, invalid_field
from pd_proxy_simulator.prompts import completion_prompts
from pd_proxy_simulator.tokens import mix, tokenize

_WIDTH = 8
_CATEGORIES = ("harassment", "hate", "self-harm", "sexual", "violence")


def check_model(body: dict[str, Any], config: SimulatorConfig) -> None:
    """Refuse a model that is not served here."""
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise invalid_field("model", "string_type", "Input should be a valid string", model)
    if model is not None and model != config.model:
        raise RequestError(404, "NotFoundError", f"The model `{model}` does not exist.", "model")


def vector(tokens: list[int], weights: int, width: int = _WIDTH) -> list[float]:
    """A unit vector."""
    seed = mix(weights + 1)
    for token in tokens:
        seed = mix(seed ^ token)
    raw = [mix(seed + place) % 2001 / 1000 - 1 for place in range(width)]
    length = math.sqrt(sum(value * value for value in raw)) or 1.0
    return [value / length for value in raw]


def embeddings(body: dict[str, Any], config: SimulatorConfig) -> tuple[bytes, str, dict[str, str]]:
    """/v1/embeddings and /pooling: the answer, its content type and further headers."""
    check_model(body, config)
    prompts = completion_prompts(body.get("input"))
    width = body.get("dimensions")
    if width is not None and (type(width) is not int or not 1 <= width <= 4096):
        raise bad_request("`dimensions` must be between 1 and 4096", "dimensions")
    for tokens in prompts:
        if len(tokens) > config.context:
            raise bad_request(f"This model's maximum context length is {config.context} tokens.", "input")
    vectors = [vector(tokens, config.weights, width or _WIDTH) for tokens in prompts]
    packed = [struct.pack(f"<{len(one)}f", *one) for one in vectors]
    form = body.get("encoding_format") or "float"
    if form == "bytes":
        metadata = {"data": [{"index": n, "shape": [len(one)]} for n, one in enumerate(vectors)]}
        return b"".join(packed), "application/octet-stream", {"metadata": json.dumps(metadata)}
    if form not in ("float", "base64"):
        raise bad_request(f"encoding_format {form!r} is not supported", "encoding_format")
    shown: list[Any] = vectors if form == "float" else [base64.b64encode(one).decode() for one in packed]
    answer = {
        "id": f"embd-{uuid.uuid4().hex}",
        "object": "list",
        "model": config.model,
        "data": [{"index": n, "object": "embedding", "embedding": one} for n, one in enumerate(shown)],
        "usage": _usage(prompts),
    }
    return json.dumps(answer).encode(), "application/json", {}


def score(body: dict[str, Any], config: SimulatorConfig) -> dict[str, Any]:
    """/score and /v1/score: one text against one or several."""
    check_model(body, config)
    first, second = _texts(body, "text_1", "queries"), _texts(body, "text_2", "documents")
    if len(first) not in (1, len(second)):
        raise bad_request("Input lengths must be either 1:1, 1:N or N:N", "text_1")
    pairs = list(zip(first * (len(second) if len(first) == 1 else 1), second, strict=True))
    return {
        "id": f"score-{uuid.uuid4().hex}",
        "object": "list",
        "model": config.model,
        "data": [{"index": n, "object": "score", "score": _likeness(a, b, config)} for n, (a, b) in enumerate(pairs)],
        "usage": _usage([tokenize(a + b) for a, b in pairs]),
    }


def rerank(body: dict[str, Any], config: SimulatorConfig) -> dict[str, Any]:
    """/rerank, /v1/rerank and /v2/rerank: documents, the best first."""
    check_model(body, config)
    [query], documents = _texts(body, "query")[:1], _texts(body, "documents")
    scores = [_likeness(query, document, config) for document in documents]
    order = sorted(range(len(documents)), key=lambda place: -scores[place])
    most = body.get("top_n") or len(order)
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": config.model,
        "results": [
            {"index": n, "document": {"text": documents[n]}, "relevance_score": scores[n]} for n in order[:most]
        ],
        "usage": {"total_tokens": sum(len(tokenize(query + document)) for document in documents)},
    }


def classify(body: dict[str, Any], config: SimulatorConfig) -> dict[str, Any]:
    """/classify."""
    check_model(body, config)
    prompts = completion_prompts(body.get("input"))
    data = []
    for number, tokens in enumerate(prompts):
        probability = abs(vector(tokens, config.weights)[0])
        label = "LABEL_0" if probability >= 0.5 else "LABEL_1"
        probabilities = [probability, 1 - probability]
        data.append({"index": number, "label": label, "probs": probabilities, "num_classes": 2})
    name = f"classify-{uuid.uuid4().hex}"
    return {"id": name, "object": "list", "model": config.model, "data": data, "usage": _usage(prompts)}


def moderate(body: dict[str, Any], config: SimulatorConfig) -> dict[str, Any]:
    """/v1/moderations, which vLLM does not have: as OpenAI's."""
    check_model(body, config)
    results = []
    for tokens in completion_prompts(body.get("input")):
        scores = dict(zip(_CATEGORIES, map(abs, vector(tokens, config.weights, len(_CATEGORIES))), strict=True))
        categories = {name: value > 0.9 for name, value in scores.items()}
        flagged = any(categories.values())
        results.append({"flagged": flagged, "categories": categories, "category_scores": scores})
    return {"id": f"modr-{uuid.uuid4().hex}", "model": config.model, "results": results}


def _texts(body: dict[str, Any], *names: str) -> list[str]:
    """A field that is one text or several, under the first of its names that is present."""
    name = next((name for name in names if name in body), names[0])
    value = body.get(name)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise invalid_field(name, "string_type", "Input should be a valid string", value)
    return texts


def _likeness(one: str, other: str, config: SimulatorConfig) -> float:
    pairs = zip(vector(tokenize(one), config.weights), vector(tokenize(other), config.weights), strict=True)
    return sum(a * b for a, b in pairs)


def _usage(prompts: list[list[int]]) -> dict[str, Any]:
    tokens = sum(map(len, prompts))
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}
