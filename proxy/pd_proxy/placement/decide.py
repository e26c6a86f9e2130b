"""Decides which backends serve a request: a pair, a mixed backend, or a decode backend without a prefill backend."""

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
"""The reasons of decisions.

- The name of the policy, where it has only one rule; also `auto` where no pair is possible and one engine serves the
  whole request.
- `earliest`, `cached`, `long`: how `auto` chose the prefill backend of a pair: by the earliest expected first token; by
  the same, with a part of the prompt cached there; behind other work, since the prompt is long.
- `prefilled_before`: an earlier try of the request has prefilled there.
- `local_short`, `local_cached`, `local_spill`: the decode backend prefills, since the prompt is short, since the part
  that is not cached there is short, or since prefill would be much later.
- `mixed_sooner`, `mixed_spill`: a mixed backend serves the whole request, since it prefills sooner, or since decode
  would miss the client's target.
"""


class View(msgspec.Struct, Generic[C], frozen=True):
    """The fleet as one decision sees it: for each role the backends that are eligible for this request now.

    Attributes:
        configured: the number of backends that each pool has for this request, whether up or not.
        pairs: whether a prefill backend may hand over to a decode backend; None where every pair is possible.
        plain: the decode backends that can answer without a hand-off; None where all can.
    """

    prefill: Sequence[C]
    decode: Sequence[C]
    mixed: Sequence[C]
    configured: Mapping[str, int]
    pairs: Callable[[C, C], bool] | None = None
    plain: Sequence[C] | None = None


class Decision(msgspec.Struct, Generic[C], frozen=True):
    """The backends that a request goes to.

    Attributes:
        decode: the backend that answers the client.
        pool: the pool of that backend: `decode`, `mixed`, or `prefill` where a prefill backend gives the whole answer.
        prefill: the prefill backend of the pair; None where `decode` computes the prompt itself.
        fallback: why there is no hand-off though there are pools for it; or empty.
        reason: one of `REASONS`.
    """

    decode: C
    pool: str
    prefill: C | None
    fallback: str
    reason: str = ""

    @property
    def chosen(self) -> tuple[str, ...]:
        """The URLs of its backends."""
        return (self.decode.url,) if self.prefill is None else (self.prefill.url, self.decode.url)


def roles_used(
    *, unsplittable: bool, prefill: bool, decode: bool, mixed: bool
) -> tuple[Literal["prefill", "decode", "mixed"], ...]:
    """The pools that a request goes to: prefill and decode where the request can be split and both are up, else mixed,
    else decode. Empty where no backend is up that could answer.

    Arguments:
        unsplittable: the request cannot be split.
        prefill, decode, mixed: whether a backend of that role is up.
    """
    if not unsplittable and decode and prefill:
        return ("prefill", "decode")
    if mixed:
        return ("mixed",)
    return ("decode",) if decode else ()


def choose(candidates: Sequence[C], role: str, policy: str, ask: Ask) -> C:
    """Choose a candidate by a policy. One that is to be avoided is chosen only where all are.

    Arguments:
        candidates: at least one.
        role: the pool, since `auto` has a rule for each.
    """
    if ask.avoid:
        candidates = [c for c in candidates if c.url not in ask.avoid] or candidates
    return candidates[CHOICES[role][policy](candidates, ask)]


def decide(
    view: View[C],
    ask: Ask,
    *,
    unsplittable: str,
    policies: Mapping[str, str],
    allow_local_prefill: bool,
    prefill_answers: bool = False,
) -> Decision[C]:
    """Choose the backends for one try.

    Arguments:
        unsplittable: why the request cannot be split, or empty.
        policies: the name of the policy for each role.
        allow_local_prefill: whether a decode backend may prefill a prompt itself.
        prefill_answers: whether a prefill backend can give the whole answer, which is one token.
    Raises:
        NoBackend: no backend that is up may serve the request.
        InvalidRequest: the request cannot be split, and the settings forbid that a decode backend serves it whole, or
            none can.
    """
    if prefill_answers and any(c.url not in ask.avoid for c in view.prefill):
        policy = policies["prefill"]
        chosen = choose(view.prefill, "prefill", policy, ask)
        return Decision(chosen, "prefill", None, "", policy)
    prefills, decodes = view.prefill, view.decode
    if view.pairs is not None:
        decodes = [d for d in decodes if any(view.pairs(p, d) for p in prefills)]
    if prefills and decodes and not unsplittable:  # the same rule as in `roles_used`
        return _decide_pair(view, decodes, ask, policies, allow_local_prefill)
    return _decide_whole(view, ask, unsplittable, policies, allow_local_prefill)


def _decide_pair(
    view: View[C], decodes: Sequence[C], ask: Ask, policies: Mapping[str, str], allow_local_prefill: bool
) -> Decision[C]:
    """Choose a pair, or one backend that is expected to serve the whole request sooner.

    Arguments:
        decodes: the decode backends that a prefill backend may hand over to. Neither these nor `view.prefill` are
            empty.
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
    view: View[C], ask: Ask, unsplittable: str, policies: Mapping[str, str], allow_local_prefill: bool
) -> Decision[C]:
    """Choose one backend for a request for which there is no pair.

    Raises:
        NoBackend: as `decide`.
        InvalidRequest: as `decide`.
    """
    used = roles_used(unsplittable=bool(unsplittable), prefill=False, decode=bool(view.decode), mixed=bool(view.mixed))
    split_configured = view.configured["prefill"] > 0 or view.configured["decode"] > 0
    fallback = unsplittable or _missing(view) if split_configured else ""
    if "mixed" in used:
        policy = policies["mixed"]
        return Decision(choose(view.mixed, "mixed", policy, ask), "mixed", None, fallback, policy)
    if not used:
        raise NoBackend(_nobody(view), retry_after=1)
    plain = view.decode if view.plain is None else view.plain
    if allow_local_prefill and plain:
        policy = policies["decode"]
        # The decode backend prefills and decodes, so the policy's rule is that of the mixed pool.
        decode = choose(plain, "mixed", policy, ask)
        return Decision(decode, "decode", None, fallback, policy)
    why = "their connector does not let them" if allow_local_prefill else "fallback: reject"
    if unsplittable:
        raise InvalidRequest(
            f"`{unsplittable}` cannot be split between prefill and decode, and this gateway's decode backends do not "
            f"prefill ({why})",
            param=unsplittable,
        )
    lacking = "prefill backend is up" if not view.prefill else "prefill backend that is up matches a decode backend"
    raise NoBackend(f"no {lacking}, and decode backends may not prefill ({why})", retry_after=1)


def _missing(view: View[C]) -> str:
    """The reason why there is no pair."""
    if view.prefill and view.decode:
        return "no_matching_pair"
    return "no_decode_backend" if view.prefill else "no_prefill_backend"


def _nobody(view: View[C]) -> str:
    """The error text where no backend can answer. It names no addresses."""
    counts = ", ".join(f"{count} {role}" for role, count in view.configured.items() if count)
    return f"no backend that could answer is up (configured: {counts or 'none'})"
