"""What all tests share."""

from __future__ import annotations

import os

# Settings come from the environment too; a developer's own must not change what is tested.
for name in [name for name in os.environ if name.startswith("PD_PROXY_")]:
    del os.environ[name]
