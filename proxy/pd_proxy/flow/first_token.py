"""Decides which engine's first token a client gets: prefill's, or decode's, once it has the KV cache.

Whether prefill's token could be used is decided before anything is sent, and prefill is asked for it only then. So
other requests cost no more. Whether it is used is decided by prefill's answer and by what is known of both engines. A
token that cannot be used is not a failure: decode samples it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

from pd_proxy.dialects.usage import read_usage
from pd_proxy.fleet.backend import Backend
from pd_proxy.flow.attempt import Attempt
from pd_proxy.flow.request import Request
from pd_proxy.handoff.answer import PrefillAnswer
from pd_proxy.handoff.connector import Connector
from pd_proxy.handoff.first_token import inexact_because, read
from pd_proxy.handoff.opening import opening_events, whole_answer
from pd_proxy.requests.body import Body
from pd_proxy.settings.tree import Settings

_RESUME_OFF = "resume_off"


class FirstTokens:
    """The rules by which prefill's token is used, and the part of the answer that it becomes.

    Arguments:
        connectors: the connectors of the groups.
    """

    def __init__(self, settings: Settings, connectors: Sequence[Connector]) -> None:
        self._forced = settings.first_token == "prefill"
        self._limit = settings.limits.transcript
        self.on = settings.first_token != "decode"
        self._takes_whole = self.on and all(
            connector.traits.first_token or (self._forced and connector.traits.plain_prefill)
            for connector in connectors
        )

    def is_prefills(self, max_tokens: int) -> bool:
        """Whether a prefill backend can answer a request by itself, since the request asks for at most one token."""
        return max_tokens <= 1 and self._takes_whole

    def consider(self, request: Request, prefill: Backend, decode: Backend, connector: Connector) -> str:
        """Why the first token of this try must be decode's, or an empty string. The record keeps the reason."""
        if request.continuation is not None:
            return "resumed"  # the client has its first token
        why = self._why_not(request, prefill, decode) if connector.traits.first_token else "connector"
        record = request.record
        record.first_token_from, record.first_token_reason = "decode", why
        return why

    def _why_not(self, request: Request, prefill: Backend, decode: Backend) -> str:
        own, other = prefill.identity, decode.identity
        if own is None or other is None:
            return "unknown_engine"
        if own.block_size != other.block_size or own.version != other.version:
            return "unlike_engines"
        body = request.body
        if body.endpoint == "chat" and (prefill.has_reasoning or decode.has_reasoning):
            return "reasoning"
        if why := inexact_because(body, even_inexact=self._forced):
            return why
        # Once the client has the token, a failure of the rest can only be mended by a resume.
        if request.transcript is not None and request.transcript.inexact == "off" and not self._forced:
            return _RESUME_OFF
        return ""

    def take(self, attempt: Attempt, prefill: Backend, answer: PrefillAnswer) -> None:
        """Prefill has answered with a usable hand-off: keep its token in `attempt`, or a reason in the record."""
        request, identities = attempt.request, attempt.identities
        assert identities is not None
        known = identities[0] is prefill.identity and attempt.decode_is_as_known()
        block_size, context = (identities[1].block_size, min(one.context for one in identities)) if known else (0, 0)
        first = read(answer, request.body, block_size=block_size, context=context, limit=self._limit)
        if isinstance(first, str):
            if first == "reasoning":
                prefill.has_reasoning = True
            request.record.first_token_reason = first
            return
        if first.engine and prefill.engine_id not in ("", first.engine):
            prefill.learn(None)
            request.record.first_token_reason = "unknown_engine"
            return
        prefill.engine_id = first.engine or prefill.engine_id
        attempt.first, attempt.rest = first, attempt.plan.behind(first)

    def give(self, attempt: Attempt) -> bool:
        """Send the client prefill's token, unless its answer is not streamed and decode is still to answer. Returns
        whether the client has its whole answer."""
        first, request = attempt.first, attempt.request
        assert first is not None
        record, client, body = request.record, request.client, request.body
        if first.whole:
            self._count(request, attempt)
            record.decode, record.decode_pool = "", "prefill"  # decode gets no leg
        elif not body.stream:
            record.first_token_from, record.first_token_reason = "prefill", self._exactness(body)
            return False
        record.first_token_from = "prefill"
        record.first_token_reason = "whole" if first.whole else self._exactness(body)
        if not body.stream:
            request.respond(whole_answer(first, body))
            return True
        role, token, end = opening_events(first, body)
        transcript = request.transcript
        assert transcript is not None
        transcript.open(role or token, first.prompt if request.token_ids else b"")
        if transcript.continuable:
            transcript.note(first.token, first.text)
        record.last_token = now = monotonic()
        record.tokens = record.tokens or 1
        request.begin_stream(now)
        if first.whole:
            client.end(role + token + end)
        else:
            client.write(role + token)
        return first.whole

    def _exactness(self, body: Body) -> str:
        return "inexact" if self._forced and inexact_because(body, even_inexact=False) else "exact"

    def _count(self, request: Request, attempt: Attempt) -> None:
        assert attempt.first is not None
        if usage := read_usage(attempt.first.answer.usage):
            request.record.prompt_tokens = usage.prompt_tokens or 0
            request.record.tokens = usage.completion_tokens or 0
