"""Examines all engines in the settings, tries pairs of them, and makes a report.

It serves no clients. It sends engines what a gateway sends at its start: health checks (`fleet/health/prober.py`), and
a request for one token through each pair that it tries (`flow/trial.py`), whose blocks are freed at its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pd_proxy.doctor.differences import differences, together
from pd_proxy.doctor.pairs import choose_pairs
from pd_proxy.doctor.report import Engine, Handoff, Report
from pd_proxy.fleet.backend import Backend, Role
from pd_proxy.fleet.findings import Finding, found, in_order
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.health.probe import ProbeFailed
from pd_proxy.fleet.health.prober import Prober
from pd_proxy.fleet.health.profile import Profile
from pd_proxy.fleet.readiness import readiness
from pd_proxy.fleet.zmq.listener import CannotListen
from pd_proxy.fleet.zmq.notifications import TransferNotifications
from pd_proxy.fleet.zmq.registrations import Registrations
from pd_proxy.flow.callbacks import Callbacks
from pd_proxy.flow.trial import Trial, Trials, model_of, tolerated, usable, wrong_connector, wrong_role
from pd_proxy.handoff.connector import UNKNOWN, Connector
from pd_proxy.handoff.connectors.registry import connectors
from pd_proxy.http.control import Control
from pd_proxy.settings.tree import Settings

MOST_PAIRS = 16
"""The default number of pairs to try. It takes some seconds, and includes each engine of up to 16 of each role."""

_PROBES_AT_ONCE = 16
_TRIALS_AT_ONCE = 4
_REGISTERS_WITHIN = 6.0  # seconds; engines that register do so every three
_TICK = 0.05


async def examine(settings: Settings, *, most_pairs: int = MOST_PAIRS) -> Report:
    """Examine the engines that some settings name.

    Arguments:
        most_pairs: the most pairs to try; with 0 the engines are only probed.
    """
    examination = _Examination(settings, most_pairs)
    try:
        return await examination.run()
    finally:
        examination.close()


class _Examination:
    """One run of the examination, with the parts of a gateway that it needs."""

    def __init__(self, settings: Settings, most_pairs: int) -> None:
        self._most_pairs = most_pairs
        handoff_key = settings.handoff_key
        self._fleet = Fleet(settings)
        self._connectors = connectors("" if handoff_key is None else handoff_key.get_secret_value())
        self._notices = TransferNotifications(settings.zmq.notices)
        self._registrations = Registrations(self._fleet, settings.zmq, self._connectors)
        callbacks = Callbacks(settings.metaserver.url)
        self._trials = Trials(settings, self._fleet, self._connectors, self._notices, callbacks, ports=True)
        control = Control(settings.health.timeout, self._trials.authorization)
        self._prober = Prober(self._fleet, settings.health, control, connectors=self._connectors)
        self._trials.inspector = self._prober
        self._backends = list(self._fleet)
        self._failures: dict[Backend, ProbeFailed] = {}
        self._findings: list[Finding] = []
        self._listening = False

    def close(self) -> None:
        self._trials.close()
        self._notices.close()
        self._registrations.close()

    async def run(self) -> Report:
        self._listen()
        await self._probe_all()
        profiles = await self._ask_all()
        engines = [self._engine(backend, profile) for backend, profile in profiles.items()]
        chosen = self._choose() if self._most_pairs else []
        trials = await self._try_all(chosen)
        self._check_engines(profiles, trials)
        self._findings += differences(engines)
        self._check_groups()
        return Report(
            tuple(engines),
            tuple(self._handoff(trial) for trial in trials),
            tuple(in_order(self._findings)),
            sum(len(self._pairs(group)) for group in self._fleet.groups),
        )

    def _listen(self) -> None:
        """Open the sockets for engines that register or send notifications, as with some connectors."""
        try:
            self._notices.start()
            self._registrations.start()
            self._listening = True
        except CannotListen as error:
            what = f"hand-offs whose engines send the gateway messages over ZeroMQ cannot be tried: {error}"
            self._findings.append(found("cannot_try", what, severity="warning"))

    # Engines

    async def _probe_all(self) -> None:
        """Probe all engines. With `connector: auto` the report of one may mean that others must be probed again."""
        free = asyncio.Semaphore(_PROBES_AT_ONCE)

        async def probe(backend: Backend) -> None:
            async with free:
                await self._probe_one(backend)

        for _ in range(3):
            waiting = [backend for backend in self._backends if not backend.up and backend not in self._failures]
            await asyncio.gather(*map(probe, waiting))
        late = [backend for backend, failure in self._failures.items() if failure.code == "unregistered"]
        if late and self._listening:
            await self._registered(late)
            for backend in late:
                del self._failures[backend]
            await asyncio.gather(*map(probe, late))

    async def _probe_one(self, backend: Backend) -> None:
        try:
            await self._prober.probe_and_learn(backend)
        except ProbeFailed as failure:
            self._failures[backend] = failure
        else:
            self._fleet.bring_in(backend)

    async def _registered(self, backends: Sequence[Backend]) -> None:
        for _ in range(round(_REGISTERS_WITHIN / _TICK)):
            if all(backend.registered for backend in backends):
                return
            await asyncio.sleep(_TICK)

    async def _ask_all(self) -> dict[Backend, Profile]:
        """The profiles of the engines that answer: how they were started."""
        free = asyncio.Semaphore(_PROBES_AT_ONCE)

        async def ask(backend: Backend) -> Profile:
            failure = self._failures.get(backend)
            if failure is not None and failure.code not in ("no_coordinates", "unregistered", "asleep"):
                return Profile()
            async with free:
                return await self._trials.profile(backend)

        return dict(zip(self._backends, await asyncio.gather(*map(ask, self._backends)), strict=True))

    def _engine(self, backend: Backend, profile: Profile) -> Engine:
        failure = self._failures.get(backend)
        unheard = failure is not None and failure.code == "unregistered" and not self._listening
        return Engine(
            url=backend.url,
            role=backend.role,
            group=backend.group,
            kind=backend.kind.name,
            state="unknown" if unheard else "up" if backend.up else "down",
            says=profile.role,
            version=backend.version,
            connector=backend.connector if backend.role in ("prefill", "decode") else "",
            tells=profile.connectors,
            block_size=profile.block_size,
            context=profile.context,
            prefix_caching=profile.prefix_caching,
            tp=profile.tp,
            models=None if backend.models is None else tuple(sorted(backend.models)),
        )

    def _check_engines(self, profiles: dict[Backend, Profile], trials: Sequence[Trial]) -> None:
        """Add the findings about single engines. A wrong role is a warning where the engine's connector works in any
        role and no hand-off has failed."""
        failed = {url for trial in trials if trial.finding is not None for url in (trial.prefill, trial.decode)}
        for backend, profile in profiles.items():
            misfit = wrong_role(backend, profile)
            if misfit is not None and self._connector(backend).traits.any_role and backend.url not in failed:
                misfit = tolerated(misfit)
            if misfit is None and backend.connector:
                misfit = wrong_connector(backend, profile, self._connectors)
            if misfit is not None:
                self._findings.append(misfit)
            failure = self._failures.get(backend)
            if failure is None:
                if not backend.models:
                    what = f"{backend.role} backend {backend.url} is up, but lists no model at /v1/models"
                    self._findings.append(found("no_models", what, backend.url))
                if backend.role == "prefill" and profile.prefix_caching is False:
                    what = f"prefill backend {backend.url} has no prefix cache: prefix caching is off"
                    self._findings.append(found("uncached", what, backend.url, severity="note"))
            elif failure.code == "unregistered" and not self._listening:
                continue
            elif misfit is None or failure.code not in ("no_coordinates", "unregistered"):
                self._findings.append(failure.finding(backend))
        reported = {(finding.code, url) for finding in self._findings for url in finding.backends}
        of_pairs = [trial.finding for trial in trials if trial.finding is not None]
        of_pairs += [warning for trial in trials for warning in trial.warnings if len(warning.backends) > 1]
        self._findings += together(
            [finding for finding in of_pairs if reported.isdisjoint((finding.code, url) for url in finding.backends)]
        )
        for trial in trials:
            if trial.finding is None and trial.unreachable and trial.side is not None:
                where = f"{trial.side[0]}:{trial.side[1]}"
                what = f"prefill {trial.prefill}: this machine cannot reach its side of the hand-off at {where}"
                self._findings.append(
                    found("side_unreachable", f"{what} ({trial.unreachable})", trial.prefill, severity="note")
                )

    # Pairs

    def _pairs(self, group: str) -> list[tuple[Backend, Backend]]:
        prefills, decodes = self._usable(group, "prefill"), self._usable(group, "decode")
        return choose_pairs(prefills, decodes, self._may_pair, len(prefills) * len(decodes))

    def _may_pair(self, prefill: Backend, decode: Backend) -> bool:
        model = model_of(prefill, decode)
        return model is not None and self._fleet.pairing.pairs(prefill, decode, model or None)

    def _choose(self) -> list[tuple[Backend, Backend]]:
        """The pairs to try, taken from all groups in turn."""
        chosen: list[tuple[Backend, Backend]] = []
        of_groups = []
        for group in self._fleet.groups:
            pairs = self._pairs(group)
            if pairs and self._connector(pairs[0][1]).traits.called_back:
                what = f"group {group}: its decode engines call the gateway back, so only a gateway can try its pairs"
                self._findings.append(found("cannot_try", what, severity="note"))
            elif pairs and self._connector(pairs[0][1]).traits.notified and not self._listening:
                continue
            else:
                of_groups.append(pairs)
        while any(of_groups):
            chosen += [pairs.pop(0) for pairs in of_groups if pairs]
        left = {backend for pair in chosen[self._most_pairs :] for backend in pair}
        left -= {backend for pair in chosen[: self._most_pairs] for backend in pair}
        if left:
            urls = sorted(backend.url for backend in left)
            what = f"{len(urls)} engine(s) were in none of the {self._most_pairs} pairs that were tried"
            self._findings.append(found("not_tried", what, *urls, severity="warning"))
        return chosen[: self._most_pairs]

    async def _try_all(self, pairs: Sequence[tuple[Backend, Backend]]) -> list[Trial]:
        free = asyncio.Semaphore(_TRIALS_AT_ONCE)

        async def attempt(prefill: Backend, decode: Backend) -> Trial:
            async with free:
                try:
                    return await self._trials.run(prefill, decode)
                except Exception as error:  # a defect of pd-proxy, which must not hide the other findings
                    what = f"prefill {prefill.url} and decode {decode.url}: the trial itself failed: {error!r}"
                    defect = found("failed", what, prefill.url, decode.url, advice="Report it as a defect of pd-proxy.")
                    return Trial(prefill.url, decode.url, defect)

        return list(await asyncio.gather(*(attempt(*pair) for pair in pairs)))

    def _handoff(self, trial: Trial) -> Handoff:
        [group] = {backend.group for backend in self._backends if backend.url == trial.prefill}
        side = trial.side
        shown = "" if side is None else f"[{side[0]}]:{side[1]}" if ":" in side[0] else f"{side[0]}:{side[1]}"
        return Handoff(
            group,
            trial.prefill,
            trial.decode,
            "ok" if trial.finding is None else trial.finding.code,
            shown,
            None if side is None else not trial.unreachable,
            trial.seconds,
        )

    def _check_groups(self) -> None:
        """Add the findings about whole groups."""
        lacking = readiness(self._fleet)
        if not lacking:
            self._findings.append(found("nothing_to_serve", "the settings name no backend"))
        for group, missing in lacking.items():
            roles = {backend.role for backend in self._backends if backend.group == group}
            if not missing:
                self._findings += self._unpaired(group)
            elif "mixed" not in roles and (unnamed := [role for role in ("prefill", "decode") if role not in roles]):
                what = f"group {group}: the settings name no {' and no '.join(unnamed)} backend"
                self._findings.append(found("nothing_to_serve", what))
            elif self._usable(group, "prefill") and self._usable(group, "decode"):
                self._findings.append(found("no_pair", f"group {group}: {missing}"))

    def _unpaired(self, group: str) -> list[Finding]:
        """Findings about the engines without a possible pair, in a group that has pairs."""
        prefills, decodes = self._usable(group, "prefill"), self._usable(group, "decode")
        findings = []
        for backend in (*prefills, *decodes):
            own = [backend]
            pools = (own, decodes) if backend.role == "prefill" else (prefills, own)
            if all(pools) and (why := self._fleet.pairing.why_none(*pools)):
                what = f"{backend.role} backend {backend.url} can be paired with none of group {group}: {why}"
                findings.append(found("no_pair", what, backend.url))
        return findings

    def _usable(self, group: str, role: Role) -> list[Backend]:
        return [backend for backend in self._fleet.pool(role) if backend.group == group and usable(backend)]

    def _connector(self, backend: Backend) -> Connector:
        return self._connectors.get(backend.connector, UNKNOWN)
