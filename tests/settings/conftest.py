"""What the tests of settings share: a settings file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.settings.helpers import Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write the settings file."""

    def write(text: str) -> Path:
        path = tmp_path / "gateway.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write
