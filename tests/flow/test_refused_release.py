"""Hand-offs that decode refuses: prefill's blocks are freed exactly once."""

from __future__ import annotations

from typing import Any

import pytest
from pd_proxy.dialects.engine_errors import engine_error

from tests.support import chat, completion, pools, until

PATHS = {"/v1/chat/completions": chat, "/v1/completions": completion}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
async def test_no_leg_releases_blocks_that_a_refusal_of_decodes_handler_has_freed(path: str, stream: bool) -> None:
    async with pools(engine={"max_model_len": 256}) as (running, [p], [d]):
        body = PATHS[path](max_tokens=5000, stream=stream)
        answer = await running.http.post(path, json=body)
        assert answer.status_code == 400
        await until(running.idle)
        await until(lambda: not p.engine.used_blocks)
        assert [request.status for request in d.requests] == [400]
        assert p.engine.handoffs.late_notifications == 0


@pytest.mark.parametrize("path", PATHS)
async def test_a_leg_releases_a_hand_off_that_was_refused_before_the_handler(path: str) -> None:
    async with pools() as (running, [p], [d]):
        # On the prefill leg it does not stand, and the decode engine's own check of bodies refuses it.
        answer = await running.http.post(path, json=PATHS[path](stop=5))
        assert answer.status_code == 400
        await until(running.idle)
        await until(lambda: not p.engine.used_blocks)
        assert len(d.requests) == 2, "one that is refused, and one that releases"
        assert p.engine.handoffs.late_notifications == 0


def refusal(kind: str | None, param: str | None = None) -> bytes:
    return (f'{{"error":{{"message":"no","type":"{kind}","param":{_json(param)},"code":400}}}}').encode()


def _json(text: str | None) -> str:
    return "null" if text is None else f'"{text}"'


@pytest.mark.parametrize(
    ("status", "body", "handled"),
    [
        (400, refusal("BadRequestError", "max_tokens"), True),
        (400, refusal("BadRequestError", "input_tokens"), True),
        (400, refusal("BadRequestError", "temperature"), True),
        (400, refusal("BadRequestError"), True),
        (404, refusal("NotFoundError", "model"), True),
        (400, refusal("Bad Request", "body.temperature"), False),
        (400, refusal("BadRequestError", "logprobs"), False),
        (400, refusal("BadRequestError", "stream_options"), False),
        (400, refusal("BadRequestError", "tool_choice"), False),
        (404, b'{"detail":"Not Found"}', False),
        (400, b"nonsense", False),
    ],
)
def test_the_answer_shows_whether_the_handler_has_refused(status: int, body: bytes, handled: bool) -> None:
    error: Any = engine_error("http://d:1", status, {}, body)
    assert error.handled is handled


@pytest.mark.parametrize("body", [b"", b"busy", b'{"error":"scaling"}', b"<html>", refusal("Service Unavailable")])
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_engines_error_has_a_retry_after(status: int, body: bytes) -> None:
    assert engine_error("http://d:1", status, {}, body).retry_after == 1
    assert engine_error("http://d:1", status, {b"retry-after": b"7"}, body).retry_after == 7
