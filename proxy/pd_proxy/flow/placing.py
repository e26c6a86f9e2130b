"""Chooses the backends of each try: passes the state of fleet, request and prompt to the pure functions of
placement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any

from pd_proxy.errors import (
    BackendAborted,
    BackendBusy,
    BackendCut,
    BackendLacksModel,
    BackendLost,
    BackendStopping,
    BackendUnreachable,
    HandoffExpired,
    InvalidRequest,
    NoBackend,
)
from pd_proxy.fleet.backend import Backend, Lease
from pd_proxy.fleet.engine_families import KINDS, Kind
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.pairing import same_weights
from pd_proxy.fleet.readiness import models_without_pair
from pd_proxy.flow.decisions import MOST_CANDIDATES, Decisions, Explanation, explanation_of
from pd_proxy.flow.first_token import FirstTokens
from pd_proxy.flow.prompts import Prompts, Sent
from pd_proxy.flow.request import Request
from pd_proxy.handoff.connector import UNKNOWN, Connector
from pd_proxy.placement.ask import NOTHING_CACHED, Ask
from pd_proxy.placement.auto import time_to_first_token
from pd_proxy.placement.decide import Decision, View, choose, decide
from pd_proxy.placement.eligibility import Eligible, Members, Needs, Rules, eligible, left_out
from pd_proxy.placement.ranks import by_engine, rank_for
from pd_proxy.requests.body import Body
from pd_proxy.requests.endpoints import LAYOUTS
from pd_proxy.settings.tree import Settings

_UNRELATED_TO_HANDOFF = {
    kind.reason
    for kind in (
        BackendBusy,
        BackendLacksModel,
        BackendUnreachable,
        BackendLost,
        BackendCut,
        BackendAborted,
        BackendStopping,
        HandoffExpired,
    )
}
_BRIEF = 512  # tokens: up to here the prefix index is not asked for a prompt, if the engines are fast
_WORTH_LOOKING = 0.005  # seconds: a prompt that takes less to compute is not looked for in the prefix index
_UNKNOWN_PACE = 0.001  # seconds a token, until an engine has prefilled; at this pace every prompt is looked for
_FOLLOWED = 8  # one in so many of these prompts is followed all the same, to measure the speed of the engines
_PACED = 0.25  # seconds for which the pace of the slowest engine is kept
_LEARNING = frozenset({"auto"})
_LOOKING = frozenset({"auto", "prefix"})
"""The policies that use what engines have in their prefix caches."""


class Placing:
    """Places the tries of a gateway's requests.

    Arguments:
        connectors: the protocols that engines speak, by name.
        in_use: the connectors that the fleet may speak.
        prompts: which engines have which prompts in their prefix caches.
        random: returns a number in [0, 1), for ties and random policies.
    Attributes:
        decisions: the last decisions.
        learns: a policy or a target uses the speed of the engines.
        looks: a policy or a target uses what engines have in their prefix caches.
        wants_sessions: a policy uses the session that a request belongs to.
    """

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        connectors: Mapping[str, Connector],
        in_use: Sequence[Connector],
        first_tokens: FirstTokens,
        prompts: Prompts,
        random: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._prompts = prompts
        self._random = random
        self._first_tokens = first_tokens
        self._policies = {role: getattr(settings.policy, role) for role in ("prefill", "decode", "mixed")}
        named = set(self._policies.values())
        self.learns = not _LEARNING.isdisjoint(named) or settings.admission.slo != "off"
        self.looks = not _LOOKING.isdisjoint(named) or settings.admission.slo != "off"
        self.wants_sessions = "session" in named
        self._local_prefill = settings.fallback == "local_prefill"
        self._turn = 1
        self._pace = 0.0  # seconds for a token, of the slowest engine
        self._paced_until = 0.0
        self.decisions = Decisions()
        usual = settings.targets
        self._usual_targets = usual.ttft, usual.tpot
        self._targets = {one.name: (one.ttft or usual.ttft, one.tpot or usual.tpot) for one in settings.clients}
        self._endpoints = frozenset[str]().union(*(connector.traits.endpoints for connector in in_use))
        self._rules = _rules(
            {**connectors, UNKNOWN.name: UNKNOWN},
            in_use,
            [KINDS[name] for name in {group.kind for group in settings.all_groups()}],
        )
        self._ordinary = {
            endpoint: ""
            for endpoint, layout in LAYOUTS.items()
            if self._rules.all_plain and endpoint in self._rules.endpoints_everywhere and layout.ranked
        }

    def may_split(self, body: Body) -> bool:
        """Whether the backends of some group can split a request between prefill and decode."""
        return body.endpoint in self._endpoints and (
            not body.unsplittable or body.unsplittable in self._rules.splits_somewhere
        )

    def decide(self, request: Request) -> Decision[Backend]:
        """Place one try, and note the decision.

        Raises:
            NoBackend: no backend is up.
            BackendBusy, BackendLacksModel: no backend is up; the error of the last try, which is more exact.
        """
        record, decisions = request.record, self.decisions
        found = self.eligible(request)
        ask = request.ask = self.ask(request)
        self._turn += 1
        try:
            decision = self._choose(request, found, ask)
        except NoBackend as error:
            self._note_none(request, found, ask, error)
            if isinstance(request.error, BackendBusy | BackendLacksModel):
                raise request.error from None
            error.__cause__ = request.error
            raise
        prefill = decision.prefill
        record.placed(decision.pool, decision.decode.url, prefill.url if prefill else "")
        record.fallback = self._fallback(decision, request.body) if decision.fallback else ""
        if decisions.due(request, ask.now):
            began = monotonic()
            full = self._explanation(request, found, ask, decision, MOST_CANDIDATES)
            decisions.note(request, ask, decision, full)
            decisions.explained(began)
        else:
            decisions.note(request, ask, decision)
        return decision

    def explain(self, request: Request) -> dict[str, Any]:
        """The decision that a request would get now, for people. It is not noted, and the request is not sent."""
        found = self.eligible(request)
        ask = self.ask(request)
        try:
            decision = self._choose(request, found, ask)
        except (NoBackend, InvalidRequest) as error:
            return self.decisions.preview(request, ask, str(error), self._explanation(request, found, ask, None, None))
        request.record.fallback = self._fallback(decision, request.body)
        full = self._explanation(request, found, ask, decision, None)
        return self.decisions.preview(request, ask, decision, full)

    def _choose(self, request: Request, found: Eligible[Backend], ask: Ask) -> Decision[Backend]:
        """Decide.

        Raises:
            NoBackend: no backend is up.
            InvalidRequest: the request cannot be split, and the settings forbid serving it whole.
        """
        body = request.body
        try:
            return decide(
                found.view,
                ask,
                unsplittable=found.unsplittable,
                policies=self._policies,
                allow_local_prefill=self._local_prefill,
                prefill_answers=body.max_tokens is not None
                and self._first_tokens.is_prefills(body.max_tokens)
                and not body.stored,
            )
        except NoBackend as error:
            if apart := models_without_pair(self._fleet, body.model):
                error.args = (f"the prefill and decode backends have no model in common: {apart}",)
            raise

    def _fallback(self, decision: Decision[Backend], body: Body) -> str:
        """Why there is no hand-off though there are pools for it, or an empty string."""
        if decision.fallback == "no_prefill_backend" and models_without_pair(self._fleet, body.model):
            return "no_matching_pair"  # prefill backends are up, but serve other models
        return decision.fallback

    def _explanation(
        self,
        request: Request,
        found: Eligible[Backend],
        ask: Ask,
        decision: Decision[Backend] | None,
        most: int | None,
    ) -> Explanation:
        """Everything that a decision takes into account, and the backends that were left out."""
        chosen = () if decision is None else decision.chosen
        pools = {role: self._fleet.pool(role) for role in ("prefill", "decode", "mixed")}
        members, needs = self._members(request), self._needs(request)
        rest = left_out(pools, members, needs, self._rules, avoid=ask.avoid, now=ask.now)
        return explanation_of(found.view, ask, rest, chosen, most)

    def _note_none(
        self,
        request: Request,
        found: Eligible[Backend],
        ask: Ask,
        error: NoBackend,
    ) -> None:
        full, began = None, monotonic()
        if due := self.decisions.due(request, ask.now):
            full = self._explanation(request, found, ask, None, MOST_CANDIDATES)
        self.decisions.note_none(request, ask, str(error), full)
        if due:
            self.decisions.explained(began)

    def eligible(self, request: Request) -> Eligible[Backend]:
        """The backends that may get a request now."""
        body, fleet = request.body, self._fleet
        if (
            self._ordinary.get(body.endpoint) == body.unsplittable
            and fleet.pairing.simple
            and not fleet.bounded
            and not request.affinity
            and not request.record.retries
            and request.continuation is None
        ):  # every backend that is up is eligible, so the rules below need not be asked
            candidates, model = fleet.candidates, body.model
            pools = candidates("prefill", model), candidates("decode", model), candidates("mixed", model)
            return Eligible(View(*pools, fleet.sizes), "")
        return eligible(self._members(request), self._needs(request), self._rules)

    def ask(self, request: Request) -> Ask:
        """What a request asks of placement now."""
        ttft, tpot = self._targets.get(request.record.client, self._usual_targets)
        cached, prompt, now = NOTHING_CACHED, request.prefill_tokens, monotonic()
        if now >= self._paced_until:
            paces = [speeds.pace for backend in self._fleet if (speeds := backend.speeds).prefills]
            self._pace = max(paces, default=_UNKNOWN_PACE)
            self._paced_until = now + _PACED
        brief = prompt <= _BRIEF and prompt * self._pace <= _WORTH_LOOKING and request.chain is None
        if self.looks and not brief:
            cached = self._prompts.cached(request)
            if request.chain is not None and request.chain.tokens:
                prompt = request.chain.tokens
        ask = Ask(
            self._random,
            self._turn,
            now,
            prompt,
            request.decode_tokens,
            cached,
            request.session,
            ttft,
            tpot,
            request.avoid,
            request.prefill,
            brief and self._turn % _FOLLOWED != 0,
        )
        if self._prompts.ranked and cached and LAYOUTS[request.body.endpoint].ranked:
            ask.cached = by_engine(ask, self._prompts.ranked)
        return ask

    def rank(self, request: Request, computes: Backend) -> int | None:
        """The data-parallel rank for the prompt of a request that was placed; None for the least loaded.

        Arguments:
            computes: the backend that computes the prompt. It has several ranks.
        """
        if not self.looks or not LAYOUTS[request.body.endpoint].ranked:
            return None
        assert request.ask is not None
        return rank_for(computes, request.ask)

    def sent(self, request: Request, decode: Lease, prefill: Lease | None) -> Sent | None:
        """Note that a try sends its prompt to its backends. Returns None where no policy uses that."""
        ask = request.ask
        if ask is None or ask.brief or not (self.learns or self.looks):
            return None
        if prefill is None:
            return self._prompts.sent(request, ask, decode, None)
        return self._prompts.sent(request, ask, prefill, decode)

    def ended(self, request: Request) -> None:
        """A request has ended, well or not."""
        self._prompts.ended(request)

    def answered(self, request: Request) -> None:
        """A request has its whole answer."""
        if request.body.stored and self.looks:
            self._prompts.stored(request.record.answer, request)

    def other_decode(self, request: Request, candidates: Sequence[Backend]) -> Backend:
        """Choose one of these decode backends for a hand-off that another has not read."""
        ask = self.ask(request)
        self._turn += 1
        return choose(candidates, "decode", self._policies["decode"], ask)

    def seconds_to_first_token(self, request: Request) -> float:
        """Seconds to the first token of a request that is sent now; 0 where no backend could compute it."""
        found, ask = self.eligible(request), self.ask(request)
        view = found.view
        computing = () if found.unsplittable else view.prefill
        candidates = [*computing, *view.mixed] or view.decode
        return min((time_to_first_token(candidate, ask) for candidate in candidates), default=0.0)

    def _members(self, request: Request) -> Members[Backend]:
        fleet, candidates, model = self._fleet, self._fleet.candidates, request.body.model
        straight = self._rules.all_plain and fleet.pairing.simple and request.continuation is None
        return Members(
            candidates("prefill", model),
            candidates("decode", model),
            candidates("mixed", model),
            configured=fleet.sizes if straight else fleet.configured(model),
            pairs=None if straight else fleet.pairer(model),
            bounded=fleet.bounded,
        )

    def _needs(self, request: Request) -> Needs[Backend]:
        body = request.body
        layout = LAYOUTS[body.endpoint]
        return Needs(
            body.model,
            request.prefill_tokens,
            request.decode_tokens,
            body.endpoint,
            layout.path,
            of_one_family=layout.of_one_family,
            ranked=layout.ranked,
            unsplittable=body.unsplittable,
            given_up=self._given_up_handoff(request) if request.record.retries else "",
            pinned=request.affinity,
            fits=partial(continues, request) if request.continuation is not None else None,
        )

    def _given_up_handoff(self, request: Request) -> str:
        """Why this request is no longer split, or an empty string. After two failed tries with a hand-off the prefill
        pool or the link between the pools is the likely cause; failures of engines that are busy or gone do not
        count."""
        retries = request.record.retries
        failed = [leg for leg, reason in retries if reason not in _UNRELATED_TO_HANDOFF and leg != "encode"]
        if len(failed) < 2 or not (request.record.prefill and request.record.decode and self._local_prefill):
            return ""
        return "prefill_failed" if failed[-1] == "prefill" else "handoff_failed"


def continues(request: Request, backend: Backend) -> bool:
    """Whether a backend may continue an answer that another backend began: it must have the same weights, and so the
    same tokenizer."""
    return same_weights(request.cards, backend.models, request.body.model)


def _rules(connectors: Mapping[str, Connector], in_use: Sequence[Connector], kinds: Sequence[Kind]) -> Rules:
    """What the connectors support.

    Arguments:
        connectors: all connectors, by name.
        in_use: the connectors of the fleet.
        kinds: the engine families of the fleet.
    """
    splits = frozenset[str]().union(*(connector.traits.splittable for connector in in_use))
    endpoints = frozenset[str]().union(*(connector.traits.endpoints for connector in in_use))
    return Rules(
        splits={name: connector.traits.splittable for name, connector in connectors.items()},
        endpoints={name: connector.traits.endpoints for name, connector in connectors.items()},
        plain=frozenset(name for name, connector in connectors.items() if connector.traits.plain_decode),
        negotiates=frozenset(name for name, connector in connectors.items() if connector.traits.negotiates),
        all_plain=all(connector.traits.plain_decode for connector in in_use),
        splits_somewhere=splits,
        splits_everywhere=splits.intersection(*(connector.traits.splittable for connector in in_use)),
        endpoints_everywhere=endpoints.intersection(
            *(connector.traits.endpoints for connector in in_use),
            (name for name, layout in LAYOUTS.items() if all(layout.path in kind.routes for kind in kinds)),
        ),
    )
