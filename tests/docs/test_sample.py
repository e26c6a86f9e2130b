"""The sample of `pd-proxy doctor` in the docs is what it says."""

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


async def test_the_sample_is_what_doctor_says() -> None:
    sample = load_sample()
    page = sample.PAGE.read_text(encoding="utf-8")
    assert sample.with_sample(page, await sample.sample()) == page, "run: python docs/sample.py"
