"""The tutorial's load generator, `vllm bench serve`, against the gateway."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from .engines import COMMON_ENVIRONMENT, MODEL_NAME
from .gateway import Gateway

pytestmark = pytest.mark.real

REQUESTS = 40
# `vllm bench serve` without its console script, which the CPU build's distribution name breaks.
BENCH_SERVE = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
    "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)


@pytest.mark.parametrize(
    ("backend", "endpoint"),
    [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")],
    ids=["completions", "chat"],
)
def test_bench_serve_completes_every_request(
    venv_python: Path, model: Path, gateway: Gateway, tmp_path: Path, backend: str, endpoint: str
) -> None:
    command = [str(venv_python), "-c", BENCH_SERVE, "--backend", backend, "--endpoint", endpoint]
    command += ["--base-url", gateway.url, "--model", MODEL_NAME, "--tokenizer", str(model)]
    command += ["--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "16", "--ignore-eos"]
    command += ["--num-prompts", str(REQUESTS), "--max-concurrency", "8"]
    command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    environment = {**os.environ, **COMMON_ENVIRONMENT}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr

    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (REQUESTS, 0)
    assert result["total_output_tokens"] == REQUESTS * 16
