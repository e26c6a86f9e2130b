"""Decides which prefill backends may hand over to which decode backends.

An engine can use a KV cache only of an engine that is like it: of the same group, with the same hand-off protocol,
version and weights. A version or weights that an engine does not report are taken to match.

Invariant: `uniform` says whether all pairs are possible for every model. It is computed anew whenever a backend joins,
leaves or reports something new. So where engines are alike, a request needs no check of its pairs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pd_proxy.fleet.backend import Backend

log = logging.getLogger("pd_proxy.fleet")

Cards = Mapping[str, Mapping[str, Any]]
_UNKNOWN = ("", "")
_MOST_NAMES = 3  # models of one pool that a message names
_LONGEST_NAME = 100  # characters
_LIKELIEST = {
    "group": "its prefill and decode backends are of different groups",
    "model": "its prefill and decode backends have no model in common",
    "connector": "its prefill and decode backends are not known to speak one hand-off protocol",
    "root": "its prefill and decode backends have loaded different revisions of their model (pair_revisions)",
    "version": "its prefill and decode backends run different versions of the engine (pair_revisions)",
}
"""Why two backends cannot be paired, from the least to the most specific reason."""


class Pairing:
    """The rules for pairs, and their result for the whole fleet.

    Arguments:
        revisions: `strict` pairs only engines of one version and one model root; `any` does not compare these.
    Attributes:
        uniform: whether any prefill backend may hand over to any decode backend.
        simple: whether, in addition, all backends are of one group.
        several_models: whether the backends have different models, so that a request must name its model.
    """

    def __init__(self, revisions: Literal["strict", "any"]) -> None:
        self._strict = revisions == "strict"
        self._seen: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
        self.uniform = self.simple = True
        self.several_models = False

    def why_not(self, prefill: Backend, decode: Backend, model: str | None) -> str:
        """Why `prefill` may not hand over to `decode` in requests for `model`; empty where it may."""
        if prefill.group != decode.group:
            return "group"
        if prefill.connector != decode.connector or not prefill.connector:
            return "connector"
        if not self._strict:
            return ""
        if prefill.version != decode.version and prefill.version and decode.version:
            return "version"
        return "" if same_weights(prefill.models, decode.models, model) else "root"

    def pairs(self, prefill: Backend, decode: Backend, model: str | None) -> bool:
        """Whether `prefill` may hand over to `decode` in requests for `model`."""
        return not self.why_not(prefill, decode, model)

    def why_none(self, prefills: Sequence[Backend], decodes: Sequence[Backend]) -> str:
        """A sentence on why no prefill backend may hand over to any decode backend; empty where one may. All backends
        are of one group."""
        reasons = set()
        for prefill in prefills:
            for decode in decodes:
                if not (models := _common(prefill, decode)):
                    reasons.add("model")
                for model in models:
                    if not (reason := self.why_not(prefill, decode, model)):
                        return ""
                    reasons.add(reason)
        likeliest = max(reasons, key=list(_LIKELIEST).index)
        served = f" ({models_apart(prefills, decodes)})" if likeliest == "model" else ""
        return _LIKELIEST[likeliest] + served

    def refresh(self, backends: Iterable[Backend]) -> None:
        """Compute the attributes anew from the fleet as it is now."""
        members = [backend for backend in backends if backend.role != "encode"]  # encoders hand over no KV cache
        split = [backend for backend in members if backend.role in ("prefill", "decode")]
        versions = frozenset(backend.version for backend in split if backend.version)
        revised = frozenset(_revised(split))
        kinds = {(backend.group, backend.connector) for backend in split}
        alike = len(versions) <= 1 and not revised and len({_root(_base(b.models)) for b in split} - {""}) <= 1
        self.uniform = len(kinds) <= 1 and all(connector for _, connector in kinds) and (alike or not self._strict)
        self.simple = self.uniform and len({backend.group for backend in members}) <= 1
        bases = [base for backend in members if (base := _base(backend.models))]
        self.several_models = len({base["id"] for base in bases}) > 1 and len({_root(base) for base in bases}) > 1
        self._log_revisions(versions, revised)

    def _log_revisions(self, versions: frozenset[str], revised: frozenset[str]) -> None:
        """Log once of which engines or models there are several revisions."""
        before, self._seen = self._seen, (versions, revised)
        if not self._strict or self._seen == before:
            return
        rule = "prefill and decode are paired only within one (pair_revisions: any pairs them all)"
        if len(versions) > 1:
            log.warning("engines of versions %s: %s", ", ".join(sorted(versions)), rule)
        for model in sorted(revised):
            log.warning("model %s has more than one root: %s", model, rule)


def models_apart(prefills: Sequence[Backend], decodes: Sequence[Backend]) -> str:
    """A text on which models the prefill and the decode backends serve, where they have none in common; else empty."""
    sides = []
    for backends in (prefills, decodes):
        if not backends or any(backend.models is None for backend in backends):
            return ""
        sides.append({model for backend in backends for model in backend.models or ()})
    if not sides[0].isdisjoint(sides[1]):
        return ""
    return f"prefill serves {_listed(sides[0])}; decode serves {_listed(sides[1])}"


def _listed(models: set[str]) -> str:
    shown = ", ".join(model[:_LONGEST_NAME] for model in sorted(models)[:_MOST_NAMES])
    more = len(models) - _MOST_NAMES
    return (shown or "no model") + (f" and {more} more" if more > 0 else "")


def same_weights(one: Cards | None, other: Cards | None, model: str | None) -> bool:
    """Whether two engines have the same weights of a model, by their model cards: loaded from one place, and for an
    adapter also with the same base model.

    Arguments:
        model: None stands for the model that an engine uses for a request that names none.
    """
    if not one or not other:
        return True
    return all(a == b or not a or not b for a, b in zip(_roots(one, model), _roots(other, model), strict=True))


def _roots(cards: Cards, model: str | None) -> tuple[str, str]:
    """The root of a model, and that of the model which it adapts; empty where that is not known."""
    card = _base(cards) if model is None else cards.get(model)
    if not card:
        return _UNKNOWN
    parent = card.get("parent")
    return _root(card), _root(cards.get(parent)) if isinstance(parent, str) else ""


def _root(card: Mapping[str, Any] | None) -> str:
    root = card.get("root") if card else None
    return root if isinstance(root, str) else ""


def _common(prefill: Backend, decode: Backend) -> list[str | None]:
    """The models that both serve; None where one of the two has not listed its models."""
    if prefill.models is None or decode.models is None:
        return [None]
    return [model for model in decode.models if model in prefill.models]


def _base(cards: Cards | None) -> Mapping[str, Any] | None:
    """The base model of an engine, which it uses for a request that names none."""
    return next((card for card in (cards or {}).values() if not card.get("parent")), None)


def _revised(backends: Iterable[Backend]) -> set[str]:
    """The models that have several roots among these backends."""
    roots: dict[str, str] = {}
    found = set()
    for backend in backends:
        for model, card in (backend.models or {}).items():
            if (root := _root(card)) and roots.setdefault(model, root) != root:
                found.add(model)
    return found
