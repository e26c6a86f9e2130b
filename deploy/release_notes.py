"""Print the notes of one release: its section of CHANGELOG.md.

usage: python deploy/release_notes.py [VERSION]        (without one: the newest section)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).resolve().parents[1] / "CHANGELOG.md"


def sections(text: str) -> dict[str, str]:
    """The text of each version, without its heading, in the order of the page."""
    parts = re.split(r"^## (\S+).*$", text, flags=re.MULTILINE)
    return {version: body.strip() for version, body in zip(parts[1::2], parts[2::2], strict=True)}


def main(argv: list[str]) -> int:
    """Print the section; returns the exit status."""
    known = sections(CHANGELOG.read_text(encoding="utf-8"))
    version = argv[0].removeprefix("v") if argv else next(iter(known))
    if version not in known:
        sys.stderr.write(f"release_notes: CHANGELOG.md has no version {version}; it has {', '.join(known)}\n")
        return 1
    print(known[version])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
