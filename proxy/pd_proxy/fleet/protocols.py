"""The hand-off protocol of each group's engines: the one in the settings, or with `connector: auto` the reported one.

An engine that reports another protocol than the rest of its group is paired only with engines of its own protocol. An
engine that reports none gets the protocol of more than half of those in its group that report one. Where there is no
such majority, it gets no hand-offs.
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
        groups: the connector of each group, or `auto`.
    """

    def __init__(self, groups: Iterable[BackendGroup]) -> None:
        self.groups: dict[str, str] = {group.name: group.connector for group in groups}
        self._logged: dict[str, str] = {}

    def reported(self, group: str) -> bool:
        """Whether the engines of a group report their protocol, since the settings do not name it."""
        return self.groups[group] == AUTO

    def settle(self, group: str, members: Sequence[Backend]) -> list[Backend]:
        """Give the members of a group their connectors, after one of them has joined, left or reported something.

        Returns those whose connector has changed.
        """
        if not self.reported(group):
            usual = self.groups[group]
            changed = [backend for backend in members if backend.connector != usual]
        else:
            reports = Counter(backend.reported_connector for backend in members if backend.reported_connector)
            usual = next((name for name, count in reports.items() if 2 * count > reports.total()), "")
            changed = [backend for backend in members if backend.connector != (backend.reported_connector or usual)]
            self._log(group, reports)
        for backend in changed:
            backend.connector = backend.reported_connector or usual
        return changed

    def lacking(self, group: str, members: Sequence[Backend]) -> str:
        """Why engines of a group have no connector, for people; empty where all have one."""
        if not self.reported(group) or all(backend.connector for backend in members):
            return ""
        reports = Counter(
            backend.reported_connector or "nothing" for backend in members if backend.role in ("prefill", "decode")
        )
        counts = ", ".join(f"{count} reported {name}" for name, count in sorted(reports.items()))
        return f"connector: auto did not find out what its engines speak ({counts}): set it"

    def _log(self, group: str, reports: Counter[str]) -> None:
        names = ", ".join(sorted(reports))
        if names == self._logged.get(group, ""):
            return
        self._logged[group] = names
        if len(reports) > 1:
            log.warning(
                "group %s: its engines speak several hand-off protocols (%s), and are paired within each", group, names
            )
        else:
            log.info("group %s: its engines speak %s", group, names or "no hand-off protocol that they report")
