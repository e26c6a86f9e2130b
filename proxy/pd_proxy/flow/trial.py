"""A trial: one request for one token that shows whether the KV cache of a prefill backend reaches a decode backend.

A trial is not counted as a client's request, and its outcome does not change the health of a backend. It holds leases,
since it is work for the engines, and since a backend that drains must wait for it. Warm-ups and `pd-proxy doctor` run
trials.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address
from time import monotonic
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import msgspec

from pd_proxy.errors import GatewayError, HandoffInvalid
from pd_proxy.fleet.backend import Backend, Lease
from pd_proxy.fleet.findings import SIDE_ADVICE, Finding, found
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.health.profile import Profile
from pd_proxy.fleet.zmq.notifications import TransferNotifications
from pd_proxy.flow.attempt import new_attempt
from pd_proxy.flow.callbacks import Callbacks
from pd_proxy.flow.discard import DiscardingClient, DiscardingTelemetry
from pd_proxy.flow.legs import Legs
from pd_proxy.flow.orders import Orders
from pd_proxy.flow.request import Request, new_id
from pd_proxy.flow.trial_steps import TIMEOUT, Progress, TrialSteps
from pd_proxy.handoff.connector import Connector
from pd_proxy.requests.body import read_body
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.records import RequestRecord

log = logging.getLogger("pd_proxy.flow")

_PROMPTS = 3
_WAITS = (0.0, 0.1, 0.4)  # seconds before decode's count is read: an engine may count after it has answered
# Longer than a block of any engine (16 tokens on GPUs, 128 on Ascend), so that there is something to transfer. An id
# precedes it, so that no engine has the prompt in its prefix cache.
_PROMPT = "The decode backend reads the cache of the prefill backend and goes on from there. " * 12

T = TypeVar("T")


class Inspector(Protocol):
    """Reads what engines report about themselves: the `Prober`."""

    async def profile(self, backend: Backend) -> Profile: ...

    async def read_from_elsewhere(self, backend: Backend) -> int | None: ...

    async def why_unreachable(self, host: str, port: int) -> str: ...


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of a trial.

    Attributes:
        prefill, decode: URLs.
        finding: what is wrong; None where the KV cache was handed over, as far as the engines report.
        side: host and port of prefill's side of the hand-off, where it reports them.
        unreachable: why they cannot be connected to from here; empty where they can, or where it was not tried.
        seconds: how long it took.
        at: when it ended, as `time.monotonic`.
        warnings: what is wrong with either engine though they hand over.
    """

    prefill: str
    decode: str
    finding: Finding | None
    side: tuple[str, int] | None = None
    unreachable: str = ""
    seconds: float = 0.0
    at: float = 0.0
    warnings: tuple[Finding, ...] = ()


class Trials:
    """Runs trials.

    Arguments:
        ports: try each time to connect to prefill's side of the hand-off; else only after a failed trial.
    Attributes:
        inspector: reads what engines report about themselves; None: it is not read.
        authorization: the header line with the engines' key, which every request to an engine carries; or empty.
    """

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        connectors: Mapping[str, Connector],
        notices: TransferNotifications,
        callbacks: Callbacks | None = None,
        *,
        ports: bool = False,
    ) -> None:
        self._fleet = fleet
        self._connectors = connectors
        self._callbacks = callbacks or Callbacks(None)
        self._legs = Legs(settings, DiscardingTelemetry(), DiscardingTelemetry(), notices)
        self.authorization = self._legs.authorization
        self._ports = ports
        self._profiles: dict[Backend, Profile] = {}
        self._reads: set[Backend] = set()  # decode backends that have been observed to read a hand-off
        self.inspector: Inspector | None = None

    def close(self) -> None:
        """Close idle connections."""
        self._legs.close()

    def forget(self, backend: Backend) -> None:
        """A backend has left the fleet."""
        self.suspect(backend)
        self._legs.forget(backend)

    def suspect(self, backend: Backend) -> None:
        """Another engine may be at a backend's address now."""
        self._profiles.pop(backend, None)
        self._reads.discard(backend)

    async def run(self, prefill: Backend, decode: Backend) -> Trial:
        """Hand a KV cache over from one backend to the other."""
        if misfit := await self._known_misfit(prefill, decode):
            return Trial(prefill.url, decode.url, misfit, at=monotonic())
        before = await self._count(decode)
        began = monotonic()
        progress, error = await self._attempt(prefill, decode)
        seconds = monotonic() - began
        if error is None and progress.problem is None and before is not None:
            await self._see_read(decode, before, progress)
        missed: tuple[Finding, ...] = ()
        if progress.problem is not None and self._connectors[decode.connector].traits.may_miss:
            missed = (
                found(progress.problem[0], _missed(prefill, decode), prefill.url, decode.url, severity="warning"),
            )
            progress.problem = None
        failed = error is not None or progress.problem is not None
        unreachable = ""
        if self.inspector is not None and progress.side is not None and (self._ports or failed):
            unreachable = await self.inspector.why_unreachable(*progress.side)
        return Trial(
            prefill.url,
            decode.url,
            await self._explain(prefill, decode, progress, error, unreachable) if failed else None,
            progress.side,
            unreachable,
            seconds,
            monotonic(),
            () if failed else (*missed, *await self._oddities(prefill, decode)),
        )

    async def _attempt(self, prefill: Backend, decode: Backend) -> tuple[Progress, BaseException | None]:
        """How far a hand-off came, and the error that ended it, if any. Where prefill's answer to the prompt is the
        whole answer, it shows nothing about the pair, and another prompt is tried."""
        error: BaseException | None = None
        for _ in range(_PROMPTS):
            progress = Progress()
            try:
                async with asyncio.timeout(TIMEOUT):
                    await self._hand_over(prefill, decode, progress)
            except* (GatewayError, TimeoutError) as errors:
                error = _first(errors)
            if error is not None or progress.problem is None or progress.problem[0] != "inconclusive":
                break
        return progress, error

    # What engines report about themselves

    async def profile(self, backend: Backend) -> Profile:
        """How an engine was started, as far as it reports that. It is asked once."""
        if backend not in self._profiles:
            self._profiles[backend] = Profile() if self.inspector is None else await self.inspector.profile(backend)
        return self._profiles[backend]

    async def _known_misfit(self, prefill: Backend, decode: Backend) -> Finding | None:
        """What is known to be wrong with a pair before it is tried. An engine that gets parameters of another protocol,
        or a leg of the other role, may not answer, or may crash."""
        if self.inspector is None:
            return None
        for backend in (prefill, decode):
            profile = await self.profile(backend)
            wrong = wrong_connector(backend, profile, self._connectors)
            if wrong is None and not self._connectors[backend.connector].traits.any_role:
                wrong = wrong_role(backend, profile)
            if wrong is not None:
                return found(wrong.code, f"{_named(prefill, decode)}: {wrong.what}", prefill.url, decode.url)
        return None

    async def _oddities(self, prefill: Backend, decode: Backend) -> tuple[Finding, ...]:
        """What is wrong with engines that hand over all the same."""
        if self.inspector is None:
            return ()
        wrong_roles = [wrong_role(backend, await self.profile(backend)) for backend in (prefill, decode)]
        return tuple(tolerated(finding) for finding in wrong_roles if finding is not None)

    async def _count(self, decode: Backend) -> int | None:
        """How many tokens decode has loaded from other engines before the trial; None where that is not compared."""
        if self.inspector is None or decode in self._reads:
            return None
        return await self.inspector.read_from_elsewhere(decode)

    async def _see_read(self, decode: Backend, before: int, progress: Progress) -> None:
        """Check that decode has read what it was handed over. An engine without a connector ignores a hand-off,
        computes the prompt itself, and answers correctly."""
        assert self.inspector is not None
        for wait in _WAITS:
            await asyncio.sleep(wait)  # 0 as well: an engine of a test is in this event loop
            count = await self.inspector.read_from_elsewhere(decode)
            if count is None or count < before:
                return  # it does not report that, or it is another engine by now
            if count > before:
                self._reads.add(decode)
                return
        progress.problem = "not_read", "it computed the prompt by itself, and counts no token that came from elsewhere"

    # The legs

    async def _hand_over(self, prefill: Backend, decode: Backend, progress: Progress) -> None:
        """Both legs of a request for one token.

        Raises:
            GatewayError: a leg failed.
        """
        members = {"prompt": f"{new_id()} {_PROMPT}", "max_tokens": 1, "temperature": 0}
        if model := model_of(prefill, decode):
            members["model"] = model
        body = read_body(msgspec.json.encode(members), "completions")
        request = Request(body, DiscardingClient(), RequestRecord("completions"))
        request.record.placed("decode", decode.url, prefill.url)
        connector = self._connectors[decode.connector]
        with Lease(decode, request.decode_tokens) as lease, Lease(prefill, request.prefill_tokens) as prefill_lease:
            attempt = new_attempt(request, connector, prefill_lease, lease, callbacks=self._callbacks)
            steps = TrialSteps(self._fleet, self._legs, progress)
            try:
                await Orders(steps, self._callbacks).of(attempt).run(attempt)
            finally:
                await steps.put_away(attempt)

    # What it means

    async def _explain(
        self, prefill: Backend, decode: Backend, progress: Progress, error: BaseException | None, unreachable: str
    ) -> Finding:
        """What is wrong with a pair, after a trial that failed: with `error`, or with the problem in `progress`."""
        pair = _named(prefill, decode)
        if error is None:
            assert progress.problem is not None
            code, text = progress.problem
        elif isinstance(error, HandoffInvalid):
            code, text = "invalid_params", str(error)
        elif not progress.failed:
            code = "stalled"
            text = f"{'decode' if 'prefill' in progress.answered else 'prefill'} did not answer within {TIMEOUT:g} s"
        else:
            code, text = f"{progress.failed}_failed", str(error)
        for backend in (prefill, decode) if code != "inconclusive" and self.inspector is not None else ():
            if wrong := wrong_role(backend, await self.profile(backend)):
                return found(wrong.code, f"{pair}: {wrong.what} ({text})", prefill.url, decode.url)
        if progress.side is not None and code in ("decode_failed", "stalled", "not_read"):
            host, port = progress.side
            away = _is_loopback(host) and not _is_loopback(urlsplit(prefill.url).hostname or "")
            where = f"the hand-off sends decode to {host}:{port}"
            if away:
                text = f"{where}, which is decode's own machine: {text}"
            elif unreachable:
                text = f"{where}, which this machine cannot reach ({unreachable}): {text}"
            if away or unreachable:
                return found(
                    "side_channel",
                    f"{pair}: {text}",
                    prefill.url,
                    decode.url,
                    advice=SIDE_ADVICE.get(decode.connector),
                )
        return found(
            code,
            f"{pair}: {text}",
            prefill.url,
            decode.url,
            severity="warning" if code == "inconclusive" else "fault",
        )


def usable(backend: Backend) -> bool:
    """Whether a backend takes requests."""
    return backend.up and not backend.draining


def model_of(prefill: Backend, decode: Backend) -> str | None:
    """A model that both serve; empty where neither reports models, None where they have none in common."""
    if prefill.models is None or decode.models is None:
        return next(iter(prefill.models or decode.models or {}), "")
    return next((model for model in decode.models if model in prefill.models), None)


def wrong_role(backend: Backend, profile: Profile) -> Finding | None:
    """What is wrong with the role that an engine reports, or None."""
    if profile.role not in ("prefill", "decode") or backend.role not in ("prefill", "decode"):
        return None
    if profile.role == backend.role:
        return None
    what = f"{backend.url} is listed under {backend.role}, and says that it was started as a {profile.role} engine"
    return found("roles_swapped", what, backend.url)


def tolerated(finding: Finding) -> Finding:
    """What is wrong with an engine that hands over all the same, as a warning."""
    return replace(finding, severity="warning", what=f"{finding.what}; it hands over all the same")


def wrong_connector(backend: Backend, profile: Profile, connectors: Mapping[str, Connector]) -> Finding | None:
    """What is wrong with the connector that an engine reports, or None."""
    others = {
        fingerprint
        for name, connector in connectors.items()
        if name != backend.connector
        for fingerprint in connector.traits.fingerprints
    }
    own = connectors[backend.connector].traits.fingerprints
    if not own.isdisjoint(profile.connectors) or others.isdisjoint(profile.connectors):
        return None  # a connector that is not known here may be one that wraps the right one
    spoken = ", ".join(profile.connectors)
    what = f"{backend.url} was started with {spoken}, which is not what connector: {backend.connector} means"
    return found("wrong_connector", what, backend.url)


def _named(prefill: Backend, decode: Backend) -> str:
    return f"prefill {prefill.url} and decode {decode.url}"


def _missed(prefill: Backend, decode: Backend) -> str:
    return f"{_named(prefill, decode)}: decode found nothing of the prompt in their shared cache"


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group, however deep in it."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
