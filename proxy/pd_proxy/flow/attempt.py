"""One try of one request: its plan, its legs' ids, and what prefill has answered."""

from __future__ import annotations

import asyncio
from time import monotonic

import msgspec

from pd_proxy.dialects.cache_counts import CacheCounts
from pd_proxy.dialects.prompt_logprobs import PromptLogprobs
from pd_proxy.dialects.usage import Usage
from pd_proxy.errors import HandoffExpired
from pd_proxy.fleet.backend import Backend, Lease
from pd_proxy.fleet.health.identity import EngineIdentity
from pd_proxy.fleet.outlier.statistics import LegName
from pd_proxy.flow.callbacks import Callbacks
from pd_proxy.flow.pending_handoff import HandoffUse, PendingHandoff
from pd_proxy.flow.prompts import Sent
from pd_proxy.flow.request import Request, leg_id, new_id
from pd_proxy.handoff.connector import Connector, Handoff
from pd_proxy.handoff.first_token import FirstToken
from pd_proxy.handoff.plan import Leg, Plan
from pd_proxy.handoff.reuse import reusable
from pd_proxy.relay.stream import StreamRelay
from pd_proxy.requests.continuation import Continuation
from pd_proxy.requests.endpoints import LAYOUTS, Members


class Attempt(msgspec.Struct):
    """One try of one request.

    Attributes:
        id: the X-Request-Id of both its legs.
        alias: the id that clients see instead, where `id` names engines' addresses; else empty.
        pending: the hand-off between its legs; None before prefill's answer, and if decode computes the prompt.
        identities: of the prefill and the decode engine, where the client may get prefill's token as its first.
        lease: the lease on the backend that answers the client.
        prefill: the lease on the prefill backend, where there is one.
        first: prefill's token, once prefill has answered and the token is used.
        rest: the plan for what follows that token.
        counts: the prompt's tokens and the cached ones, from prefill's answer.
        runs_out: its prefill leg, if that runs to its end in the background.
        callback: the members of the prefill leg from the call of decode's engine.
        logprobs: log probabilities of the prompts from prefill's answer, where the client asked for them and decode's
            answer has none.
        sent: its prompt at its engines, where placement learns from that.
        paced: placement learns from the pace of its tokens.
    """

    request: Request
    plan: Plan
    id: str
    lease: Lease
    prefill: Lease | None = None
    pending: PendingHandoff | None = None
    identities: tuple[EngineIdentity, EngineIdentity] | None = None
    first: FirstToken | None = None
    rest: Plan | None = None
    counts: CacheCounts = CacheCounts()
    runs_out: asyncio.Task[None] | None = None
    alias: str = ""
    callback: Members | None = None
    logprobs: PromptLogprobs | None = None
    sent: Sent | None = None
    paced: bool = False

    @property
    def identity(self) -> dict[str, msgspec.Raw] | None:
        """Members that replace those of the answer's events, where clients must not see these."""
        if not self.alias:
            return None
        kind = "chatcmpl" if self.request.body.endpoint == "chat" else "cmpl"
        return {"id": msgspec.Raw(f'"{kind}-{self.alias}"'.encode())}

    def decode_leg(self) -> Leg:
        return (self.rest or self.plan).decode_leg(None if self.pending is None else self.pending.handoff)

    def release_leg(self) -> Leg | None:
        """A leg that frees prefill's blocks of a hand-off that no engine reads; None where no such leg is safe."""
        pending = self.pending
        if pending is None or pending.use is HandoffUse.READING:
            return None
        return self.plan.release_leg(pending.handoff, sent=pending.use is HandoffUse.REFUSED)

    @property
    def continuation(self) -> Continuation | None:
        """Where its decode leg continues, once the client has a part of the answer."""
        return (self.rest or self.plan).continuation

    def goes_to(self, decode: Backend) -> None:
        """Its hand-off is sent to another decode backend than it was made for."""
        if self.request.stored is not None:
            self.plan.answer_id = _answer_id(self.request, decode)
            self.request.record.answer = LAYOUTS[self.request.body.endpoint].id_prefix + self.plan.answer_id

    def decode_is_as_known(self) -> bool:
        """Whether the decode engine is surely the one of `identities`."""
        return self.identities is not None and self.lease.backend.identity is self.identities[1]

    def handed_over_counts(self) -> CacheCounts | None:
        """`counts`, where decode got a hand-off; else None, since decode's own counts are right."""
        return None if self.pending is None else self.counts

    def prompt_tokens(self, usage: Usage) -> int:
        """Tokens of the client's prompt. The prompt of a leg that continues an answer has that answer in it as well."""
        continuation, counted = (self.rest or self.plan).continuation, usage.prompt_tokens or 0
        return counted if continuation is None else max(0, counted - continuation.said)

    def note_usage(self, usage: Usage, said: int) -> None:
        """Keep decode's usage in the record.

        Arguments:
            said: tokens of the answer that its prompt contains.
        """
        record, counted = self.request.record, usage.prompt_tokens or 0
        record.prompt_tokens = prompt = counted - said if counted > said else 0
        cached = usage.cached_tokens if self.pending is None else self.counts.cached or 0
        record.cached_tokens = cached if cached < prompt else prompt
        if self.sent is not None and self.pending is None:
            details = usage.prompt_tokens_details
            self.sent.counted(None if said or details is None else details.cached_tokens, counted)

    def note_stream(self, relay: StreamRelay, said: int) -> None:
        """Keep in the record what a decode leg has streamed, whether it ended well or not.

        Arguments:
            said: tokens of the answer that the leg continues.
        """
        request, record = self.request, self.request.record
        request.gained, last_token = relay.given()
        record.last_token = last_token or record.last_token
        record.sequence = relay.sequence
        record.tokens = said + request.gained
        if usage := relay.usage:
            record.tokens = said + (usage.completion_tokens or request.gained)
            self.note_usage(usage, said)

    def kv_cache_arrived(self, lease: Lease) -> None:
        """Decode's first token has arrived, so its engine has the KV cache."""
        sent = self.sent
        if (pending := self.pending) is not None:
            now = monotonic()
            self.request.record.handoff_seconds = seconds = now - pending.since
            if sent is not None:
                lease.backend.speeds.handed_over(seconds, self.request.prefill_tokens, now)
            pending.settle()
        if sent is not None:
            sent.first_token()

    def begin_stream(self, relay: StreamRelay) -> None:
        """The first of decode's tokens that the client can read is about to go out."""
        now = monotonic()
        request, record = self.request, self.request.record
        if record.first_token is not None:
            before = record.last_token or now
            if request.continuation is not None:
                record.resume_gaps.append(now - before)
            else:
                record.handoff_gap = now - before
            if record.first_token_from == "prefill":
                record.second_token = record.second_token or now
        request.begin_stream(now)

    def learn_location(self, prefill: Lease, handoff: Handoff) -> None:
        """Keep the coordinates in prefill's answer, if the legs of the next try need them beforehand."""
        plan = self.plan
        if not plan.connector.traits.negotiates or plan.handoff is not None:
            return
        backend = prefill.backend
        located = plan.connector.remember(backend.coordinates, handoff, prefill.rank)
        if located != backend.coordinates:
            backend.remember(located)

    def check(self) -> None:
        """Check the decode engine just before the leg is written to its connection.

        Raises:
            HandoffExpired: the engine may not be the one that prefill's first token was used for.
        """
        if not self.decode_is_as_known():
            raise HandoffExpired("the decode engine may not be the one that it was", unread=True, blame=False)


def new_attempt(
    request: Request,
    connector: Connector,
    prefill: Lease | None,
    lease: Lease,
    *,
    token_ids: bool = False,
    identities: tuple[EngineIdentity, EngineIdentity] | None = None,
    callbacks: Callbacks | None = None,
    reuse: bool = False,
) -> Attempt:
    """A try on a pair, or on one backend.

    Arguments:
        prefill: the lease for the prefill leg, where there is one.
        lease: the lease for the leg that answers the client.
        token_ids: ask decode for the ids of the tokens.
        callbacks: receives the calls of decode engines, for the connectors whose engines call back.
        reuse: decode may take the prompt's ids from prefill.
    """
    record, decode, rendezvous = request.record, lease.backend, None
    name = new_id() if connector.traits.own_request_ids else leg_id(record.request_id)
    if prefill is not None and connector.traits.called_back:
        assert callbacks is not None
        name, rendezvous = callbacks.name(), connector.callback_params(callbacks.url)
    elif prefill is not None and connector.traits.negotiates:
        rendezvous = connector.negotiate(prefill.backend.coordinates, decode.coordinates, name, prefill.rank)
        own, name = name, rendezvous.id or name
        if request.body.prompts:
            rendezvous = connector.per_prompt(rendezvous, request.body.prompts, prefill.backend.coordinates.dp)
    plan = Plan(
        request.body,
        connector,
        request.continuation,
        rendezvous=rendezvous,
        token_ids=token_ids,
        first_token=identities is not None,
        answer_id=_answer_id(request, decode) if LAYOUTS[request.body.endpoint].id_member else "",
        reuse=reuse and prefill is not None and connector.traits.reuses_prompt_ids and reusable(request.body),
    )
    alias = own if rendezvous is not None and rendezvous.id else ""
    record.leg = name
    record.answer = LAYOUTS[request.body.endpoint].id_prefix + plan.answer_id if plan.answer_id else ""
    return Attempt(request, plan, name, lease, prefill, identities=identities, alias=alias)


def _answer_id(request: Request, decode: Backend) -> str:
    """The id of an answer of `decode`. Clients see it, so it differs from the id of the legs."""
    if request.stored is None:
        return leg_id(request.record.request_id)
    return request.stored.name(new_id(), decode.url, request.record.client)


def answering_leg(backend: Backend) -> LegName:
    """The kind of a leg that answers the client, by its backend. A prefill backend answers requests for one token."""
    return "prefill" if backend.role == "prefill" else "decode"
