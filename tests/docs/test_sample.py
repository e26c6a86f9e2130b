"""The samples of commands in the docs are the commands' output."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).resolve().parents[2] / "docs"


def load_sample() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_sample", DOCS / "sample.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_the_sample_of_doctor_is_its_output() -> None:
    sample = load_sample()
    page = sample.PAGES["doctor"].read_text(encoding="utf-8")
    assert sample.with_sample(page, "doctor", await sample.sample()) == page, "run: python docs/sample.py"


def test_the_sample_of_explain_is_its_output() -> None:
    sample = load_sample()
    page = sample.PAGES["explain"].read_text(encoding="utf-8")
    assert sample.with_sample(page, "explain", sample.explained()) == page, "run: python docs/sample.py"
