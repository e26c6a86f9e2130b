"""Which hand-off protocol the engines of each group speak: as it is set, or, with `connector: auto`, as they tell.

An engine that tells something else than the others of its group is believed: it is paired with its like only. One that
tells nothing speaks what most of its group do, if most agree; until then it is served without hand-offs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence

from pd_proxy.fleet.backend import Backend
from pd_proxy.settings.engines import BackendGroup

log = logging.getLogger("pd_proxy.fleet")

AUTO = "auto"


class Protocols:
    """The groups' connectors.

    Attributes:
        groups: every group's connector, or `auto`.
    """

    def __init__(self, groups: Iterable[BackendGroup]) -> None:
        self.groups: dict[str, str] = {group.name: group.connector for group in groups}
        self._said: dict[str, str] = {}

    def found_out(self, group: str) -> bool:
        """Whether the engines of a group are to tell."""
        return self.groups[group] == AUTO

    def settle(self, group: str, members: Sequence[Backend]) -> list[Backend]:
        """Give the members of a group their connectors, after one of them has come, left or told something.

        Returns those of them that have another one than before.
        """
        if not self.found_out(group):
            usual = self.groups[group]
            changed = [backend for backend in members if backend.connector != usual]
        else:
            told = Counter(backend.told for backend in members if backend.told)
            usual = next((name for name, count in told.items() if 2 * count > told.total()), "")
            changed = [backend for backend in members if backend.connector != (backend.told or usual)]
            self._tell(group, told)
        for backend in changed:
            backend.connector = backend.told or usual
        return changed

    def lacking(self, group: str, members: Sequence[Backend]) -> str:
        """What the engines of a group have told, for people, where they were to tell and that was not enough."""
        if not self.found_out(group) or all(backend.connector for backend in members):
            return ""
        told = Counter(backend.told or "nothing" for backend in members if backend.role in ("prefill", "decode"))
        counts = ", ".join(f"{count} told {name}" for name, count in sorted(told.items()))
        return f"connector: auto did not find out what its engines speak ({counts}): set it"

    def _tell(self, group: str, told: Counter[str]) -> None:
        said = ", ".join(sorted(told))
        if said == self._said.get(group, ""):
            return
        self._said[group] = said
        if len(told) > 1:
            log.warning(
                "group %s: its engines speak several hand-off protocols (%s), and are paired within each", group, said
            )
        else:
            log.info("group %s: its engines speak %s", group, said or "no hand-off protocol that they tell of")
