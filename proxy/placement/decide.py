"""From the backends that are up to a decision: a pair, a mixed backend, or decode alone, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Generic, Literal, TypeVar

import msgspec

from proxy.errors import InvalidRequest, NoBackend
from proxy.placement.policies import POLICIES, Candidate

C = TypeVar("C", bound=Candidate)


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
        candidates: the backends that could have answered, `decode` among them.
    """

    decode: C
    pool: str
    prefill: C | None
    fallback: str
    candidates: Sequence[C]

    @property
    def runners_up(self) -> tuple[str, ...]:
        """URLs of the backends that could have answered as well."""
        return tuple(c.url for c in self.candidates if c is not self.decode)


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


def choose(
    candidates: Sequence[C], policy: str, *, avoid: AbstractSet[str], random: Callable[[], float], turn: int
) -> C:
    """One of the candidates by a policy; of those in `avoid` only when all are. Candidates are never empty."""
    if avoid:
        candidates = [c for c in candidates if c.url not in avoid] or candidates
    return candidates[POLICIES[policy](candidates, random, turn)]


def decide(
    view: View[C],
    *,
    alone: str,
    policies: Mapping[str, str],
    avoid: AbstractSet[str],
    random: Callable[[], float],
    turn: int,
    allow_local_prefill: bool,
    prefer: str = "",
    prefill_alone: bool = False,
) -> Decision[C]:
    """Choose the backends for one try.

    Arguments:
        alone: why the request cannot be split, or empty.
        policies: the policy's name for each role.
        avoid: URLs that failed this request before; used only when nothing else is up.
        turn: counts decisions, for round robin.
        prefer: URL of a prefill backend to take if it may be had: it has the prompt in its prefix cache.
        allow_local_prefill: whether a decode backend may prefill for itself.
        prefill_alone: a prefill backend can give the whole answer, which is one token.
    Raises:
        NoBackend: nothing that is up may serve it.
        InvalidRequest: it cannot be split, and the settings forbid serving it whole on a decode backend, or none can.
    """
    if prefill_alone and any(c.url not in avoid for c in view.prefill):
        chosen = choose(view.prefill, policies["prefill"], avoid=avoid, random=random, turn=turn)
        return Decision(chosen, "prefill", None, "", view.prefill)
    prefills, decodes = view.prefill, view.decode
    if view.pairs is not None:
        decodes = [d for d in decodes if any(view.pairs(p, d) for p in prefills)]
    if prefills and decodes and not alone:  # as `roles_used` has it
        decode = choose(decodes, policies["decode"], avoid=avoid, random=random, turn=turn)
        if view.pairs is not None:
            prefills = [p for p in prefills if view.pairs(p, decode)]
        kept = [c for c in prefills if c.url == prefer] if prefer and prefer not in avoid else []
        prefill = kept[0] if kept else choose(prefills, policies["prefill"], avoid=avoid, random=random, turn=turn)
        return Decision(decode, "decode", prefill, "", decodes)
    used = roles_used(alone=bool(alone), prefill=False, decode=bool(view.decode), mixed=bool(view.mixed))
    split_configured = view.configured["prefill"] > 0 or view.configured["decode"] > 0
    missing = _missing(view)
    fallback = alone or missing if split_configured else ""
    if "mixed" in used:
        mixed = choose(view.mixed, policies["mixed"], avoid=avoid, random=random, turn=turn)
        return Decision(mixed, "mixed", None, fallback, view.mixed)
    if not used:
        raise NoBackend(_nobody(view), retry_after=1)
    plain = view.decode if view.plain is None else view.plain
    if allow_local_prefill and plain:
        decode = choose(plain, policies["decode"], avoid=avoid, random=random, turn=turn)
        return Decision(decode, "decode", None, fallback, plain)
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
