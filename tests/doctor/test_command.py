"""`pd-proxy doctor` and `pd-proxy check --probe` as commands."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from pd_proxy.cli import main

from tests.support import run_command, simulators

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return partial(run_command, capsys)


async def test_doctor_prints_tables_and_advice_and_its_exit_status_shows_the_findings(run: Run) -> None:
    async with simulators("prefill", "decode") as [p, d], simulators("prefill", side_host="127.0.0.9") as [bad]:

        async def doctor(*argv: str) -> tuple[int, str, str]:
            return await asyncio.to_thread(run, "doctor", *argv)

        good = ["--prefill", p.url, "--decode", d.url]
        status, out, err = await doctor(*good)
        assert (status, err) == (0, "")
        assert out.startswith("ROLE ")
        assert out.endswith("2 engines, 1 hand-off tried of 1 pair: all is well.\n")
        status, out, err = await doctor(*good, "--prefill", bad.url, "--json")
        assert (status, err) == (2, "")
        assert {finding["code"] for finding in json.loads(out)["findings"]} == {"side_channel"}
        status, out, _ = await doctor(*good, "--prefill", bad.url, "--pairs", "0")
        assert (status, "0 hand-offs tried of 2 pairs" in out) == (0, True)
        status, out, err = await doctor(*good, "--connector", "nixel")
        assert (status, out) == (2, "")
        assert "flag --connector" in err


@pytest.mark.parametrize("count", ["-1", "many", "1e3"])
def test_doctor_refuses_an_invalid_number_of_pairs(run: Run, count: str) -> None:
    status, out, err = run("doctor", "--pairs", count)
    assert (status, out) == (2, "")
    assert "--pairs" in err


def test_doctor_reads_the_settings_file_and_says_what_is_wrong_with_it(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("prefil: [a:1]\n")
    status, _, err = run("doctor", "--config", str(file))
    assert status == 2
    assert f"{file}:1: prefil: no such setting" in err


def test_the_help_of_doctor_has_its_flags(run: Run) -> None:
    status, out, _ = run("doctor", "--help")
    assert status == 0
    assert "--pairs N" in out and "--json" in out and "--prefill URL" in out


async def test_check_asks_the_engines_with_its_flag_probe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    async with simulators("prefill", "decode") as [p, d]:
        file.write_text(f"prefill: [{p.url}]\ndecode: [{d.url}]\n")
        assert await asyncio.to_thread(main, ["check", str(file), "--probe"]) == 0
        out = capsys.readouterr().out
        assert ": good." in out
        assert "2 engines, 0 hand-offs tried of 1 pair: all is well." in out
        d.kill()
        assert await asyncio.to_thread(main, ["check", str(file)]) == 0
        assert await asyncio.to_thread(main, ["check", str(file), "--probe"]) == 2
        assert "connection refused" in " ".join(capsys.readouterr().out.split())
        assert not p.requests and not d.requests
