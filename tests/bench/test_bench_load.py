"""The mock engine answers as vLLM does, and the load client tells good answers from bad ones."""

from __future__ import annotations

import http.client
import http.server
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import load
from bench.cases import Case
from bench.cost import counted
from bench.process import BenchError, free_port, get
from tests.bench.servers import Handler, serving

ASK_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
NIXL_KEYS = {
    "do_remote_prefill",
    "do_remote_decode",
    "remote_block_ids",
    "remote_engine_id",
    "remote_request_id",
    "remote_host",
    "remote_port",
    "tp_size",
    "dcp_size",
    "pp_size",
    "remote_num_tokens",
    "remote_blocks_expiry_time",
    "transfer_mode",
    "remote_prefill_cached_tokens",
}


def post(port: int, path: str, body: dict[str, Any]) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def prefill(port: int) -> dict[str, Any]:
    body = {"prompt": "word " * 400, "max_tokens": 1, "kv_transfer_params": ASK_PREFILL}
    status, text = post(port, "/v1/completions", body)
    assert status == 200
    params: dict[str, Any] = json.loads(text)["kv_transfer_params"]
    return params


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


class Cutting(Handler):
    """Answers with one token, [DONE] and a complete body: the status is good, but the answer is too short."""

    def do_POST(self) -> None:
        self.read_body()
        body = b'data: {"choices":[{"delta":{"content":" @1"}}]}\n\ndata: [DONE]\n\n'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Refusing(Handler):
    def do_POST(self) -> None:
        self.read_body()
        self.send_error(503)


@pytest.mark.slow
def test_the_load_program_compiles_without_warnings(program: Path) -> None:
    assert program.exists()


def test_a_failed_compilation_is_reported_with_the_compilers_output(program: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no-such-flag"):
        load.build(tmp_path, ("--no-such-flag",))


def test_a_client_connected_to_an_engine_finishes_without_bad_answers(
    program: Path, small: Case, engine_port: int
) -> None:
    report = load.drive(program, engine_port, small, timeout_s=10)
    assert (report["ok"], report["bad"], report["unfinished"]) == (48, 0, 0)
    assert report["tokens"] == 48 * 10
    assert report["status"] == {"200": 48}
    assert report["token_delay_us"]["count"] == 480
    assert 0 < report["token_delay_us"]["p50"] <= report["token_delay_us"]["p99"] <= report["token_delay_us"]["max"]
    assert 0 < report["ttft_us"]["p50"] < report["whole_us"]["p50"]
    assert counted(engine_port)["running"] == 0


def test_an_engine_sends_a_stream_one_token_for_each_tick(program: Path, small: Case, engine_port: int) -> None:
    report = load.drive(program, engine_port, replace(small, requests=24), timeout_s=10)
    assert report["seconds"] >= (10 - 1) * 0.005


@pytest.mark.parametrize(("answer", "status"), [(Refusing, "503"), (Cutting, "200")])
@pytest.mark.slow
def test_a_client_counts_refused_and_short_answers_as_bad(
    program: Path, small: Case, answer: type[Handler], status: str
) -> None:
    with serving(answer) as port:
        report = load.drive(program, port, small, timeout_s=10)
    assert (report["ok"], report["bad"], report["status"]) == (0, 48, {status: 48})


def test_a_client_of_a_closed_port_ends_and_counts_every_request_as_bad(program: Path, small: Case) -> None:
    report = load.drive(program, free_port(), small, timeout_s=10)
    assert (report["ok"], report["bad"]) == (0, 48)


def test_a_client_stops_at_its_timeout_and_reports_unfinished_requests(
    program: Path, small: Case, engine_port: int
) -> None:
    report = load.drive(program, engine_port, replace(small, tokens=10_000), timeout_s=1)
    assert (report["ok"], report["unfinished"]) == (0, 48)


def test_a_client_refuses_loads_without_bounds(program: Path, small: Case) -> None:
    with pytest.raises(BenchError, match="--concurrency 100000: not a whole number"):
        load.drive(program, 1, replace(small, concurrency=100_000))


def test_a_prefill_leg_is_answered_with_all_nixl_parameters(engine_port: int) -> None:
    params = prefill(engine_port)
    assert set(params) == NIXL_KEYS
    assert params["do_remote_prefill"] is True
    assert params["do_remote_decode"] is False
    assert len(params["remote_block_ids"][0]) > 1, "as many blocks as the prompt fills"


def test_a_decode_leg_with_a_prefills_parameters_counts_as_handed_off(engine_port: int) -> None:
    body = {"prompt": "x", "max_tokens": 2, "kv_transfer_params": prefill(engine_port)}
    assert post(engine_port, "/v1/completions", body)[0] == 200
    assert counted(engine_port)["handed_off"] == 1


@pytest.mark.parametrize(
    "key",
    ["remote_block_ids", "remote_engine_id", "remote_request_id", "remote_host", "remote_port", "tp_size"],
)
def test_a_decode_leg_without_a_required_parameter_is_refused(engine_port: int, key: str) -> None:
    params = prefill(engine_port)
    del params[key]
    status, text = post(engine_port, "/v1/completions", {"prompt": "x", "kv_transfer_params": params})
    assert status == 400
    assert key in json.loads(text)["error"]["message"]


def test_parameters_in_the_text_of_a_prompt_are_not_read_as_parameters(engine_port: int) -> None:
    prompt = '"kv_transfer_params": {"do_remote_decode": true}, \\'
    status, text = post(engine_port, "/v1/completions", {"prompt": prompt, "max_tokens": 1})
    assert status == 200
    assert json.loads(text)["kv_transfer_params"] is None


def test_a_chat_stream_has_role_tokens_with_ids_usage_and_done(engine_port: int) -> None:
    body = {"messages": [], "max_completion_tokens": 2, "max_tokens": 9, "stream": True, "return_token_ids": True}
    status, text = post(engine_port, "/v1/chat/completions", body | {"stream_options": {"include_usage": True}})
    role, first, second, usage = events(text)
    assert status == 200
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert role["prompt_token_ids"]
    assert first["choices"][0]["token_ids"]
    assert second["choices"][0]["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens"] == 2


def test_a_stream_that_does_not_ask_for_usage_or_ids_gets_neither(engine_port: int) -> None:
    _, text = post(engine_port, "/v1/completions", {"prompt": "x", "max_tokens": 2, "stream": True})
    assert len(events(text)) == 2
    assert "token_ids" not in text
    assert "usage" not in text


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/version", "/metrics"])
def test_an_engine_answers_the_probes_of_gateways(engine_port: int, path: str) -> None:
    assert get(engine_port, path)[0] == 200


def test_an_engine_answers_an_unknown_path_with_404(engine_port: int) -> None:
    assert get(engine_port, "/ready")[0] == 404
