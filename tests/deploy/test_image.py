"""The Dockerfile, without a Docker engine: it is parsed, and its builder's commands are run in an empty environment."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from pd_proxy import __version__
from pd_proxy.settings.load import configure, gather

ROOT = Path(__file__).resolve().parents[2]


class Instruction(NamedTuple):
    word: str
    rest: str


def stages() -> list[list[Instruction]]:
    """The instructions of each stage, its FROM first, without comments and with continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    found: list[list[Instruction]] = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            found.append([])
        if word and found:
            found[-1].append(Instruction(word, rest))
    return found


BUILD, FINAL = stages()


def only(stage: list[Instruction], word: str) -> str:
    (rest,) = [instruction.rest for instruction in stage if instruction.word == word]
    return rest


def final_environment() -> dict[str, str]:
    return dict(item.split("=", 1) for item in shlex.split(only(FINAL, "ENV")))


def copied_sources() -> list[str]:
    return [source for word, rest in BUILD if word == "COPY" for source in rest.split()[:-1]]


def health_check() -> list[str]:
    command = json.loads(only(FINAL, "HEALTHCHECK").partition("CMD ")[2])
    assert command[0] == "python"
    return [sys.executable, *command[1:]]


def test_both_stages_start_from_the_same_slim_python_so_that_the_environment_can_move() -> None:
    build, final = only(BUILD, "FROM"), only(FINAL, "FROM")
    assert build == f"{final} AS build"
    assert final.endswith("-slim")


def test_the_final_stage_only_copies_what_was_built() -> None:
    assert not [word for word, _ in FINAL if word in ("RUN", "ADD")]
    assert only(FINAL, "COPY") == "--from=build /opt/pd-proxy /opt/pd-proxy"
    assert "apt" not in "".join(rest for _, rest in BUILD)


def test_the_image_runs_as_a_numeric_user_that_is_not_root() -> None:
    user, group = only(FINAL, "USER").split(":")
    assert int(user) > 0
    assert int(group) > 0


def test_arguments_after_the_image_are_the_flags_of_serve() -> None:
    assert json.loads(only(FINAL, "ENTRYPOINT")) == ["pd-proxy", "serve"]
    assert json.loads(only(FINAL, "CMD")) == []


def test_the_image_listens_on_its_exposed_port_on_all_addresses_and_stops_on_sigterm() -> None:
    settings = configure({}, None, final_environment())
    assert settings.host == "0.0.0.0"
    assert settings.port == int(only(FINAL, "EXPOSE")) == 8000
    assert only(FINAL, "STOPSIGNAL") == "SIGTERM"


def test_a_mounted_file_has_precedence_over_the_images_defaults(tmp_path: Path) -> None:
    file = tmp_path / "pd-proxy.yaml"
    file.write_text("host: 127.0.0.1\nport: 9000\n")
    settings = configure({}, file, final_environment())
    assert (settings.host, settings.port) == ("127.0.0.1", 9000)
    (warning, *_) = gather({"mixed": "a:1"}, file, final_environment()).warnings
    assert warning == f"{file}:1: host: 127.0.0.1 cannot be reached from outside of this container; set 0.0.0.0"
    assert not [name for name in final_environment() if name.removeprefix("PD_PROXY_") in ("HOST", "PORT")]


@pytest.mark.parametrize("more", [[], ["--workers", "2"], ["--host", "::1"]], ids=["one", "workers", "ipv6"])
@pytest.mark.slow
async def test_the_health_check_finds_the_gateway_at_any_configured_address(more: list[str]) -> None:
    async def check(process: int) -> int:
        # A proxy that the environment names must not be used.
        asked = await asyncio.create_subprocess_exec(
            *health_check(), str(process), env={"http_proxy": "http://127.0.0.1:1"}, cwd=ROOT
        )
        return await asked.wait()

    command = [sys.executable, "-m", "pd_proxy.cli", "serve", "--port", "0", "--mixed", "http://127.0.0.1:1", *more]
    gateway = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, cwd=ROOT)
    try:
        assert gateway.stderr is not None
        async with asyncio.timeout(60):
            while b"listening on" not in await gateway.stderr.readline():
                pass
        assert await check(gateway.pid) == 0  # its backends are down, but it is alive
    finally:
        gateway.terminate()
        await gateway.communicate()
    assert await check(gateway.pid) == 1


def test_the_health_check_loads_nothing_but_the_standard_library() -> None:
    program = (
        "import sys, pd_proxy.commands.container_health; print({'pydantic', 'fastapi', 'httpx'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_context_holds_what_is_copied_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == set(copied_sources())
    assert [source for source in copied_sources() if not (ROOT / source).exists()] == []


@pytest.mark.slow
def test_the_builders_commands_give_an_environment_with_a_working_pd_proxy(tmp_path: Path) -> None:
    source, builder, runtime, wheels = (tmp_path / name for name in ("src", "builder", "runtime", "wheels"))
    source.mkdir()
    for name in copied_sources():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    venv.create(builder, with_pip=True)
    environment = {**os.environ, "PATH": f"{builder}/bin:{os.environ['PATH']}", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for command in [rest for word, rest in BUILD if word == "RUN"]:
        here = command.replace("/opt/pd-proxy", str(runtime)).replace("/wheels", str(wheels))
        done = subprocess.run(["sh", "-ec", here], cwd=source, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"

    built = sorted(wheel.name for wheel in wheels.iterdir())
    assert built == [f"{name}-{__version__}-py3-none-any.whl" for name in ("pd_proxy", "pd_proxy_simulator")]
    clean = {"PATH": f"{runtime}/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
    version = subprocess.run(["pd-proxy", "--version"], env=clean, cwd=tmp_path, capture_output=True, text=True)
    assert version.stdout == f"pd-proxy {__version__}\n", version.stderr
    simulate = subprocess.run(["pd-proxy", "simulate", "--help"], env=clean, capture_output=True, text=True)
    assert "--role" in simulate.stdout, simulate.stderr
    programs = {path.name for path in (runtime / "bin").iterdir()}
    assert not programs & {"pip", "pip3", "pytest", "ruff", "mypy"}
    site = next((runtime / "lib").glob("python3*")) / "site-packages"
    assert (site / "pd_proxy").is_dir()
    assert not (site / "tests").exists()
    assert (site / "pd_proxy" / "pd-proxy.yaml").read_text() == (ROOT / "config" / "pd-proxy.yaml").read_text()
    assert (site / "pd_proxy" / "py.typed").exists()
    # The image's entry point, as `docker run IMAGE --prefill ... --decode ...` starts it.
    flags = ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"]
    serve = [*json.loads(only(FINAL, "ENTRYPOINT")), *flags]
    with subprocess.Popen(
        serve, env={**clean, "PD_PROXY_DEFAULTS": "host=0.0.0.0,port=0"}, cwd=tmp_path, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, b"")
            url = next(
                found for line in lines if (found := re.search(r"listening on http://0.0.0.0:(\d+)", line.decode()))
            )
            assert httpx.get(f"http://127.0.0.1:{url[1]}/health", trust_env=False, verify=False).json() == {
                "status": "alive"
            }
        finally:
            process.terminate()
            process.wait(30)
    assert process.returncode == 0
