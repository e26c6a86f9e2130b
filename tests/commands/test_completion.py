"""The scripts by which shells complete the command line."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from pd_proxy import cli
from pd_proxy.commands.completion import SHELLS
from pd_proxy.settings.tree import leaves


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The script of each shell, as a file."""
    folder = tmp_path_factory.mktemp("scripts")
    found = {shell: folder / shell for shell in SHELLS}
    capture = pytest.MonkeyPatch()
    for shell, file in found.items():
        with file.open("w") as out, capture.context() as patch:
            patch.setattr("sys.stdout", out)
            assert cli.main(["completion", shell]) == 0
    return found


def completed(script: Path, *words: str) -> set[str]:
    """The words that bash offers to complete the last of the given words."""
    program = (
        f'source {script}; COMP_WORDS=(pd-proxy "$@"); COMP_CWORD=$#; COMP_LINE="${{COMP_WORDS[*]}}"; '
        "COMP_POINT=${#COMP_LINE}; "
        "$(complete -p pd-proxy | sed -E 's/.*-F ([^ ]+).*/\\1/') pd-proxy \"${COMP_WORDS[COMP_CWORD]}\" "
        '"${COMP_WORDS[COMP_CWORD-1]}"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program, "bash", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ser"], {"serve"}),
        (["serve", "--log-f"], {"--log-format"}),
        (["serve", "--timeouts.f"], {"--timeouts.first-token"}),
        (["serve", "--log-format", ""], {"text", "json"}),
        (["serve", "--fallback", "r"], {"reject"}),
        (["config", "--def"], {"--default", "--default-model"}),
        (["simulate", "--role", "pre"], {"prefill"}),
        (["explain", "--admin-k"], {"--admin-key-file"}),
        (["explain", "--endpoint", "comp"], {"completions"}),
        (["completion", ""], set(SHELLS)),
    ],
)
@pytest.mark.slow
def test_bash_completes_commands_flags_and_words(scripts: dict[str, Path], words: list[str], offered: set[str]) -> None:
    assert completed(scripts["bash"], *words) == offered


@pytest.mark.parametrize("shell", SHELLS)
def test_each_script_has_every_flag_and_valid_syntax_for_its_shell(shell: str, scripts: dict[str, Path]) -> None:
    text = scripts[shell].read_text()
    for name, _ in leaves():
        assert name.replace("_", "-") in text, name
    if shutil.which(shell) is not None:
        done = subprocess.run([shell, "-n", str(scripts[shell])], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
