"""deploy/prometheus.yml under a real Prometheus."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest
import yaml

from tests.support import chat, pools

CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "prometheus.yml"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("promtool") and shutil.which("prometheus")),
        reason="no prometheus and promtool on PATH (Debian: apt-get install prometheus)",
    ),
]
SECONDS = 30.0


def test_promtool_accepts_the_settings() -> None:
    done = subprocess.run(["promtool", "check", "config", CONFIG], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


@asynccontextmanager
async def prometheus(config: dict[str, Any], folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A Prometheus on loopback with these settings; yields a client for it."""
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (folder / "log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            stdout=log,
            stderr=log,
        )
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, verify=False) as http:
                yield http
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                try:
                    await asyncio.wait_for(process.wait(), 10)
                except TimeoutError:
                    process.kill()
                    await process.wait()


async def query(http: httpx.AsyncClient, expression: str, count: int) -> list[dict[str, Any]]:
    """The series of an instant query, once there are this many."""
    deadline = monotonic() + SECONDS
    found: list[dict[str, Any]] = []
    while monotonic() < deadline:
        try:
            answer = await http.get("/api/v1/query", params={"query": expression})
        except httpx.TransportError:
            answer = None  # Prometheus is not listening yet
        if answer is not None and answer.status_code == 200:
            found = answer.json()["data"]["result"]
            if len(found) == count:
                return found
        await asyncio.sleep(0.1)
    pytest.fail(f"{expression}: {len(found)} series and not {count} after {SECONDS:g} s: {found}")


def on_loopback(ports: dict[str, int]) -> dict[str, Any]:
    """The shipped settings, with each target replaced by its address here, and scraped quickly."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "300ms", "scrape_timeout": "300ms"}
    for job in config["scrape_configs"]:
        for group in job["static_configs"]:
            group["targets"] = [f"127.0.0.1:{ports[target.partition(':')[0]]}" for target in group["targets"]]
    return config


async def test_prometheus_scrapes_the_metrics_of_the_gateway_and_the_engines(tmp_path: Path) -> None:
    async with pools(2, 2, engine={"step_time": 0.0}) as (gateway, prefill, decode):
        names = {f"prefill-{i}": e.port for i, e in enumerate(prefill, 1)}
        names |= {f"decode-{i}": e.port for i, e in enumerate(decode, 1)}
        answer = await gateway.http.post("/v1/chat/completions", json=chat())
        assert answer.status_code == 200
        async with prometheus(on_loopback({"gateway": gateway.port, **names}), tmp_path) as http:
            series = await query(http, "pd_proxy_backend_up == 1", 4)
            assert {one["metric"]["job"] for one in series} == {"pd-proxy"}
            await query(http, "up == 1", 5)
            engines = await query(http, 'count by (role) (up{job="engines"} == 1)', 2)
            assert {one["metric"]["role"]: one["value"][1] for one in engines} == {"prefill": "2", "decode": "2"}
