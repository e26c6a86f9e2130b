"""What the tests of settings share: the errors of wrong settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pd_proxy.settings.load import configure
from pd_proxy.settings.problems import ConfigurationError

Write = Callable[[str], Path]
"""Writes a settings file (the fixture `write`)."""


def wrong(flags: dict[str, Any], file: Path | None = None) -> list[str]:
    """The lines of the error message, without the folder of the file."""
    with pytest.raises(ConfigurationError) as caught:
        configure(flags, file, os.environ)
    folder = f"{file.parent}/" if file else "\0"
    return [line.removeprefix(folder) for line in str(caught.value).splitlines()]
