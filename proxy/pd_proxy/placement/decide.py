"""From the backends that are up to a decision: a pair, a mixed backend, or decode alone, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Literal, TypeVar

import msgspec

from pd_proxy.errors import InvalidRequest, NoBackend
from pd_proxy.placement.ask import Ask
from pd_proxy.placement.auto import CHOICES, Learnt, why_first
from pd_proxy.placement.local import instead
from pd_proxy.placement.policies import POLICIES

C = TypeVar("C", bound=Learnt)


REASONS = frozenset(
    {
        *POLICIES,
        *("earliest", "cached", "long", "auto", "prefilled_before"),
        *("local_short", "local_cached", "local_spill", "mixed_sooner", "mixed_spill"),
    }
)
"""What a decision says of its own reason.

The name of the policy, where it has but one rule (`auto` where one engine serves the whole request, since there is no
pair for it). Of `auto`, for the prefill backend of a pair: `earliest` expected first token; the same, with a part of
the prompt `cached` there; `long`: behind other long prompts. `prefilled_before`: by an earlier try of the request.
`local_short`, `local_cached`, `local_spill`: decode prefills, since the prompt is short, since what of it is not cached
there is short, or since prefill is much later. `mixed_sooner`, `mixed_spill`: a mixed backend takes it, since it
prefills sooner, or since decode misses the client's target.
"""


class View(msgspec.Struct, Generic[C], frozen=True):
    """The fleet as one decision sees it: per role the backends that may take this request now.

    Attributes:
        configured: how many backends each pool has for this request, up or not.
        pairs: whether a prefill backend may hand over to a decode backend; None where any may to any.
        plain: the decode backends that answer right without a hand-off; None where all do.
    """

    prefill: Sequence[C]
    decode: Sequence[C]
    mixed: Sequence[C]
    configured: Mapping[str, int]
    pairs: Callable[[C, C], bool] | None = None
    plain: Sequence[C] | None = None


class Decision(msgspec.Struct, Generic[C], frozen=True):
    """Where a request goes.

    Attributes:
        decode: the backend that answers the client.
        pool: its pool, `decode` or `mixed`.
        prefill: the other half of the pair, or None when `decode` computes the prompt itself.
        fallback: why there is no hand-off though there are pools for it, or empty.
        reason: what decided: one of `REASONS`.
    """

    decode: C
    pool: str
    prefill: C | None
    fallback: str
    reason: str = ""

    @property
    def chosen(self) -> tuple[str, ...]:
        """URLs of the backends that serve it."""
        return (self.decode.url,) if self.prefill is None else (self.prefill.url, self.decode.url)


def roles_used(
    *, alone: bool, prefill: bool, decode: bool, mixed: bool
) -> tuple[Literal["prefill", "decode", "mixed"], ...]:
    """The pools that a request goes to: a pair where it can be split and both are up, else a mixed backend, else decode
    by itself. Empty when nothing is up that could answer.

    Arguments:
        alone: it cannot be split.
        prefill, decode, mixed: whether a backend of that role is up.
    """
    if not alone and decode and prefill:
        return ("prefill", "decode")
    if mixed:
        return ("mixed",)
    return ("decode",) if decode else ()


def choose(candidates: Sequence[C], role: str, policy: str, ask: Ask) -> C:
    """One of the candidates by a policy; of those to avoid only when all are. Candidates are never empty.

    Arguments:
        role: the pool whose rule it is: `auto` has one for each.
    """
    if ask.avoid:
        candidates = [c for c in candidates if c.url not in ask.avoid] or candidates
    return candidates[CHOICES[role][policy](candidates, ask)]


def decide(
    view: View[C],
    ask: Ask,
    *,
    alone: str,
    policies: Mapping[str, str],
    allow_local_prefill: bool,
    prefill_alone: bool = False,
) -> Decision[C]:
    """Choose the backends for one try.

    Arguments:
        alone: why the request cannot be split, or empty.
        policies: the policy's name for each role.
        allow_local_prefill: whether a decode backend may prefill for itself.
        prefill_alone: a prefill backend can give the whole answer, which is one token.
    Raises:
        NoBackend: nothing that is up may serve it.
        InvalidRequest: it cannot be split, and the settings forbid serving it whole on a decode backend, or none can.
    """
    if prefill_alone and any(c.url not in ask.avoid for c in view.prefill):
        policy = policies["prefill"]
        chosen = choose(view.prefill, "prefill", policy, ask)
        return Decision(chosen, "prefill", None, "", policy)
    prefills, decodes = view.prefill, view.decode
    if view.pairs is not None:
        decodes = [d for d in decodes if any(view.pairs(p, d) for p in prefills)]
    if prefills and decodes and not alone:  # as `roles_used` has it
        return _decide_pair(view, decodes, ask, policies, allow_local_prefill)
    return _decide_whole(view, ask, alone, policies, allow_local_prefill)


def _decide_pair(
    view: View[C], decodes: Sequence[C], ask: Ask, policies: Mapping[str, str], allow_local_prefill: bool
) -> Decision[C]:
    """Choose a pair, or one backend that is expected to serve the whole request sooner.

    Arguments:
        decodes: the decode backends that a prefill backend may hand over to; not empty, as `view.prefill` is not.
    """
    decode = choose(decodes, "decode", policies["decode"], ask)
    prefills = view.prefill
    if view.pairs is not None:
        prefills = [p for p in prefills if view.pairs(p, decode)]
    policy = policies["prefill"]
    if ask.prefer and ask.prefer not in ask.avoid:
        for prefill in prefills:
            if prefill.url == ask.prefer:
                return Decision(decode, "decode", prefill, "", "prefilled_before")
    prefill = choose(prefills, "prefill", policy, ask)
    if policy != "auto":
        return Decision(decode, "decode", prefill, "", policy)
    if ask.brief:
        return Decision(decode, "decode", prefill, "", "earliest")
    wholes: Sequence[C] = ()
    if allow_local_prefill:
        wholes = view.decode if view.plain is None else view.plain
    better = instead(prefill, decode, wholes, view.mixed, ask)
    if better is None:
        return Decision(decode, "decode", prefill, "", why_first(prefill, ask))
    return Decision(better.backend, better.pool, None, "", better.reason)


def _decide_whole(
    view: View[C], ask: Ask, alone: str, policies: Mapping[str, str], allow_local_prefill: bool
) -> Decision[C]:
    """Choose one backend for a request for which there is no pair.

    Raises:
        NoBackend: as `decide`.
        InvalidRequest: as `decide`.
    """
    used = roles_used(alone=bool(alone), prefill=False, decode=bool(view.decode), mixed=bool(view.mixed))
    split_configured = view.configured["prefill"] > 0 or view.configured["decode"] > 0
    fallback = alone or _missing(view) if split_configured else ""
    if "mixed" in used:
        policy = policies["mixed"]
        return Decision(choose(view.mixed, "mixed", policy, ask), "mixed", None, fallback, policy)
    if not used:
        raise NoBackend(_nobody(view), retry_after=1)
    plain = view.decode if view.plain is None else view.plain
    if allow_local_prefill and plain:
        policy = policies["decode"]
        # It prefills and decodes, as a mixed one does.
        decode = choose(plain, "mixed", policy, ask)
        return Decision(decode, "decode", None, fallback, policy)
    why = "their connector does not let them" if allow_local_prefill else "fallback: reject"
    if alone:
        raise InvalidRequest(
            f"`{alone}` cannot be split between prefill and decode, and this gateway's decode backends do not prefill "
            f"({why})",
            param=alone,
        )
    lacking = "prefill backend is up" if not view.prefill else "prefill backend that is up matches a decode backend"
    raise NoBackend(f"no {lacking}, and decode backends may not prefill ({why})", retry_after=1)


def _missing(view: View[C]) -> str:
    """Why there is no pair."""
    if view.prefill and view.decode:
        return "no_matching_pair"
    return "no_decode_backend" if view.prefill else "no_prefill_backend"


def _nobody(view: View[C]) -> str:
    """Says which pool is missing, without naming an address."""
    counts = ", ".join(f"{count} {role}" for role, count in view.configured.items() if count)
    return f"no backend that could answer is up (configured: {counts or 'none'})"
