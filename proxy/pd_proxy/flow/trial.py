"""One request for one token through a pair of backends: does the KV cache of the one get to the other?

It is no client's request: it is in no metric of clients' requests, and its outcome counts neither for nor against a
backend. It does hold leases, since it is work for the engines, and a backend that is draining must wait for it.
Warm-ups and `pd-proxy doctor` are made of it.
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
from pd_proxy.flow.trial_steps import PATIENCE, Course, TrialSteps
from pd_proxy.handoff.connector import Connector
from pd_proxy.requests.body import read_body
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.records import RequestRecord

log = logging.getLogger("pd_proxy.flow")

_PROMPTS = 3
_LOOKS = (0.0, 0.1, 0.4)  # seconds before looks at decode's count: an engine may count after it has answered
# Longer than a block of any engine (16 tokens on GPUs, 128 on Ascend), so that there is something to transfer. An id
# goes before it, so that no engine has it in its prefix cache and can do without the other.
_PROMPT = "The decode backend reads the cache of the prefill backend and goes on from there. " * 12

T = TypeVar("T")


class Witness(Protocol):
    """Asks engines what they say of themselves: the `Prober`."""

    async def profile(self, backend: Backend) -> Profile: ...

    async def read_from_elsewhere(self, backend: Backend) -> int | None: ...

    async def why_unreachable(self, host: str, port: int) -> str: ...


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of a trial.

    Attributes:
        prefill, decode: URLs.
        finding: what is wrong; None where the KV cache was handed over, as far as the engines tell.
        side: host and port of prefill's side of the hand-off, where it says them.
        unreachable: why these cannot be connected to from here; empty where they can, or that was not tried.
        seconds: how long it took.
        at: when it ended, as `time.monotonic`.
        warnings: what is odd about either engine, though they hand over.
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
        ports: whether to look each time if prefill's side of the hand-off can be connected to from here; else only
            where it failed.
    Attributes:
        witness: asks engines what they say of themselves; None: they are not asked.
        authorization: what every request to an engine carries, as whole lines.
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
        self._reads: set[Backend] = set()  # those that have been seen to read what they are handed over
        self.witness: Witness | None = None

    def close(self) -> None:
        """Close idle connections."""
        self._legs.close()

    def forget(self, backend: Backend) -> None:
        """A backend has left."""
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
        course, error = await self._attempt(prefill, decode)
        seconds = monotonic() - began
        if error is None and course.problem is None and before is not None:
            await self._see_read(decode, before, course)
        missed: tuple[Finding, ...] = ()
        if course.problem is not None and self._connectors[decode.connector].traits.may_miss:
            missed = (found(course.problem[0], _missed(prefill, decode), prefill.url, decode.url, severity="warning"),)
            course.problem = None
        failed = error is not None or course.problem is not None
        unreachable = ""
        if self.witness is not None and course.side is not None and (self._ports or failed):
            unreachable = await self.witness.why_unreachable(*course.side)
        return Trial(
            prefill.url,
            decode.url,
            await self._explain(prefill, decode, course, error, unreachable) if failed else None,
            course.side,
            unreachable,
            seconds,
            monotonic(),
            () if failed else (*missed, *await self._oddities(prefill, decode)),
        )

    async def _attempt(self, prefill: Backend, decode: Backend) -> tuple[Course, BaseException | None]:
        """How far a hand-off came, and the error that ended it, if one did. A prompt at which prefill's answer is whole
        says nothing of the pair, so others are tried."""
        error: BaseException | None = None
        for _ in range(_PROMPTS):
            course = Course()
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._hand_over(prefill, decode, course)
            except* (GatewayError, TimeoutError) as errors:
                error = _first(errors)
            if error is not None or course.problem is None or course.problem[0] != "inconclusive":
                break
        return course, error

    # What engines say of themselves

    async def profile(self, backend: Backend) -> Profile:
        """What an engine tells of how it was started; it is asked once."""
        if backend not in self._profiles:
            self._profiles[backend] = Profile() if self.witness is None else await self.witness.profile(backend)
        return self._profiles[backend]

    async def _known_misfit(self, prefill: Backend, decode: Backend) -> Finding | None:
        """What is known to be wrong with a pair before it is tried: an engine that is sent what it does not speak, or
        the other role's leg, may leave it unanswered, or die of it."""
        if self.witness is None:
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
        """What is odd about engines that hand over all the same."""
        if self.witness is None:
            return ()
        told = [wrong_role(backend, await self.profile(backend)) for backend in (prefill, decode)]
        return tuple(tolerated(finding) for finding in told if finding is not None)

    async def _count(self, decode: Backend) -> int | None:
        """What decode has read from others before the trial, where that is to be compared; else None."""
        if self.witness is None or decode in self._reads:
            return None
        return await self.witness.read_from_elsewhere(decode)

    async def _see_read(self, decode: Backend, before: int, course: Course) -> None:
        """See that decode has read what it was handed over: an engine without a connector takes no notice of a
        hand-off, computes the prompt itself, and answers as well."""
        assert self.witness is not None
        for wait in _LOOKS:
            await asyncio.sleep(wait)  # 0 as well: an engine of a test is in this event loop
            count = await self.witness.read_from_elsewhere(decode)
            if count is None or count < before:
                return  # it does not say, or it is another engine by now
            if count > before:
                self._reads.add(decode)
                return
        course.problem = "not_read", "it computed the prompt by itself, and counts no token that came from elsewhere"

    # The legs

    async def _hand_over(self, prefill: Backend, decode: Backend, course: Course) -> None:
        """Both legs of a request for one token.

        Raises:
            GatewayError: it did not get through.
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
            steps = TrialSteps(self._fleet, self._legs, course)
            try:
                await Orders(steps, self._callbacks).of(attempt).run(attempt)
            finally:
                await steps.put_away(attempt)

    # What it means

    async def _explain(
        self, prefill: Backend, decode: Backend, course: Course, error: BaseException | None, unreachable: str
    ) -> Finding:
        """What is wrong with a pair, after a trial that failed: with `error`, or with the course's problem."""
        pair = _named(prefill, decode)
        if error is None:
            assert course.problem is not None
            code, text = course.problem
        elif isinstance(error, HandoffInvalid):
            code, text = "invalid_params", str(error)
        elif not course.failed:
            code = "stalled"
            text = f"{'decode' if 'prefill' in course.answered else 'prefill'} did not answer within {PATIENCE:g} s"
        else:
            code, text = f"{course.failed}_failed", str(error)
        for backend in (prefill, decode) if code != "inconclusive" and self.witness is not None else ():
            if wrong := wrong_role(backend, await self.profile(backend)):
                return found(wrong.code, f"{pair}: {wrong.what} ({text})", prefill.url, decode.url)
        if course.side is not None and code in ("decode_failed", "stalled", "not_read"):
            host, port = course.side
            away = _is_loopback(host) and not _is_loopback(urlsplit(prefill.url).hostname or "")
            where = f"the hand-off sends decode to {host}:{port}"
            if away:
                text = f"{where}, which is decode's own machine: {text}"
            elif unreachable:
                text = f"{where}, where this machine finds nobody ({unreachable}): {text}"
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
    """A model that both serve; empty where neither has named one, None where they have none in common."""
    if prefill.models is None or decode.models is None:
        return next(iter(prefill.models or decode.models or {}), "")
    return next((model for model in decode.models if model in prefill.models), None)


def wrong_role(backend: Backend, profile: Profile) -> Finding | None:
    """What is wrong with the role that an engine tells of, if anything is."""
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
    """What is wrong with the connector that an engine tells of, if anything is."""
    marks = {
        mark
        for name, connector in connectors.items()
        if name != backend.connector
        for mark in connector.traits.fingerprints
    }
    own, told = connectors[backend.connector].traits.fingerprints, ", ".join(profile.connectors)
    if not own.isdisjoint(profile.connectors) or marks.isdisjoint(profile.connectors):
        return None  # a connector that is not known here may be one that wraps the right one
    what = f"{backend.url} was started with {told}, which is not what connector: {backend.connector} means"
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
