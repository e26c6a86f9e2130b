"""What the engine refuses is refused by the gateway in the same way."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from .bed import Bed
from .engines import MAX_MODEL_LEN
from .gateway import Gateway
from .questions import Api, body_for, prompt_of

pytestmark = pytest.mark.real

FAULTS: dict[str, dict[str, Any]] = {
    "a stream that is no boolean": {"stream": "maybe"},
    "no choice asked for": {"n": 0},
    "no token asked for": {"max_tokens": 0},
    "more tokens than the context holds": {"max_tokens": MAX_MODEL_LEN * 2},
    "stream options without a stream": {"stream_options": {"include_usage": True}},
    "more tokens at least than at most": {"min_tokens": 9, "max_tokens": 3},
    "two greedy choices": {"n": 2},
    "a negative temperature": {"temperature": -1},
}
SHAPES = {
    "messages that are no list": (Api.CHAT, b'{"model": "tiny", "messages": "hello"}'),
    "no message": (Api.CHAT, b'{"model": "tiny", "messages": []}'),
    "messages missing": (Api.CHAT, b'{"model": "tiny"}'),
    "no prompt": (Api.COMPLETIONS, b'{"model": "tiny", "prompt": []}'),
    "an empty prompt": (Api.COMPLETIONS, b'{"model": "tiny", "prompt": ""}'),
    "a body that is no JSON": (Api.COMPLETIONS, b"hello"),
    "a body that is a list": (Api.CHAT, b"[1, 2]"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("api", Api, ids=lambda api: api.name.lower())
def test_a_prompt_too_long_gets_the_engines_own_refusal(bed: Bed, gateway: Gateway, api: Api, stream: bool) -> None:
    body = {**body_for(api, prompt_of(MAX_MODEL_LEN + 100)), "stream": stream}
    engine = httpx.post(bed.decode.url + api.value, json=body, timeout=60)
    answer = httpx.post(gateway.url + api.value, json=body, timeout=60)
    assert (answer.status_code, answer.json()) == (400, engine.json())
    assert answer.json()["error"]["param"] == "input_tokens"


@pytest.mark.parametrize("api", Api, ids=lambda api: api.name.lower())
def test_an_unknown_model_is_not_found(gateway: Gateway, api: Api) -> None:
    answer = httpx.post(gateway.url + api.value, json={**body_for(api, "Kana"), "model": "absent"}, timeout=60)
    assert answer.status_code == 404
    assert "absent" in answer.json()["error"]["message"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("api", Api, ids=lambda api: api.name.lower())
def test_a_bad_field_gets_the_engines_status(bed: Bed, gateway: Gateway, api: Api, fault: str) -> None:
    body = body_for(api, prompt_of(40), **FAULTS[fault])
    engine = httpx.post(bed.decode.url + api.value, json=body, timeout=60)
    answer = httpx.post(gateway.url + api.value, json=body, timeout=60)
    assert answer.status_code == engine.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_body_of_the_wrong_shape_gets_the_engines_status(bed: Bed, gateway: Gateway, shape: str) -> None:
    api, content = SHAPES[shape]
    headers = {"content-type": "application/json"}
    engine = httpx.post(bed.decode.url + api.value, content=content, headers=headers, timeout=60)
    answer = httpx.post(gateway.url + api.value, content=content, headers=headers, timeout=60)
    assert answer.status_code == engine.status_code == 400
    assert answer.json()["error"]["message"]


def test_hand_off_parameters_of_a_client_reach_no_engine(bed: Bed, gateway: Gateway) -> None:
    """If they were sent to decode unchanged, they would kill it."""
    body = body_for(Api.CHAT, prompt_of(64, "forged"), kv_transfer_params={"do_remote_prefill": True})
    answer = httpx.post(gateway.url + Api.CHAT.value, json=body, timeout=60)
    assert answer.status_code in (200, 400)
    assert bed.decode.is_healthy()
    assert bed.prefill.is_healthy()
