"""What all tests share."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says nothing here but how busy the machine is.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.hookimpl(optionalhook=True)  # for those who run pytest without xdist, to debug
def pytest_xdist_auto_num_workers() -> int:
    """Processes for `pytest -n auto`: two a core, since tests wait for half of their time."""
    return 2 * (os.cpu_count() or 1)


# Settings come from the environment too; a developer's own must not change what is tested.
for name in [name for name in os.environ if name.startswith("PD_PROXY_")]:
    del os.environ[name]
