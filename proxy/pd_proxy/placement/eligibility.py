"""Which backends are eligible for a request, before a policy compares them; and for all others, the rule that excludes
them.

These are pure functions over the backends and the needs of the request. `eligible` is called for every request. Where
all engines are alike and the request is an ordinary one, it looks at no single backend. `left_out` applies the same
rules to each backend, and is called only to explain a decision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Generic, Literal, Protocol, TypeVar

import msgspec

from pd_proxy.placement.auto import Learnt
from pd_proxy.placement.decide import View

Rule = Literal[
    "draining",
    "down",
    "model",
    "ejected",
    "resting",
    "full",
    "weights",
    "pinned",
    "connector",
    "endpoint",
    "unsplit",
    "pairing",
    "avoided",
]
"""Why a backend is not eligible for a request.

- `down`, `draining`: the backend is in that state.
- `model`: it does not have the request's model.
- `ejected`: the outlier detector has ejected it.
- `resting`: it has said that it is busy.
- `full`: the request would exceed its bounds.
- `weights`: the answer was begun by an engine with other weights.
- `connector`: its hand-off protocol cannot split such a request.
- `endpoint`: it does not have the request's route.
- `pinned`: another backend stores the response that the request continues.
- `unsplit`: it is a prefill backend, and the request is served whole.
- `pairing`: no backend of the other role can be paired with it.
- `avoided`: it has failed this request, and others have not.
"""


class Kind(Protocol):
    """The engine family of a backend."""

    @property
    def routes(self) -> frozenset[str]: ...


class Member(Learnt, Protocol):
    """A backend as these rules see it."""

    @property
    def up(self) -> bool: ...

    @property
    def draining(self) -> bool: ...

    @property
    def resting_until(self) -> float: ...

    @property
    def connector(self) -> str: ...

    @property
    def ranks(self) -> Sequence[int]: ...

    @property
    def kind(self) -> Kind: ...

    def serves(self, model: str | None) -> bool: ...

    def offers(self, route: str) -> bool: ...

    def has_capacity(self, tokens: int) -> bool: ...


M = TypeVar("M", bound=Member)


class Rules(msgspec.Struct, frozen=True):
    """What the connectors of a gateway support; the same for all requests.

    Attributes:
        splits: by connector, the reasons of `Body.unsplittable` for which its engines can still split a request.
        endpoints: by connector, the endpoints whose requests it splits.
        plain: the connectors whose decode engines can answer without a hand-off.
        negotiates: the connectors whose legs know each other's address, ranks included, before they are sent.
        all_plain: whether all connectors in use are plain.
        splits_somewhere, splits_everywhere: the reasons in `splits` of at least one, and of all connectors in use.
        endpoints_everywhere: the endpoints that all connectors in use split and that all engine families have.
    """

    splits: Mapping[str, AbstractSet[str]]
    endpoints: Mapping[str, AbstractSet[str]]
    plain: AbstractSet[str]
    negotiates: AbstractSet[str]
    all_plain: bool
    splits_somewhere: AbstractSet[str]
    splits_everywhere: AbstractSet[str]
    endpoints_everywhere: AbstractSet[str]


class Needs(msgspec.Struct, Generic[M]):
    """What one request needs of backends.

    Attributes:
        model: the model that it names; None where it names none.
        prefill_tokens, decode_tokens: the tokens that its legs count on their backends.
        endpoint: the name of its endpoint.
        path: the path under which engines serve that endpoint.
        of_one_family: whether only one engine family has the endpoint.
        ranked: whether its legs can carry the data-parallel rank that they are for.
        unsplittable: why its body cannot be split, or empty.
        given_up: why it is no longer split after failures, or empty.
        pinned: the URL of the only backend that can serve it, or empty.
        fits: whether a backend may continue the answer that was begun; None where none was begun.
    """

    model: str | None
    prefill_tokens: int
    decode_tokens: int
    endpoint: str
    path: str
    of_one_family: bool = False
    ranked: bool = True
    unsplittable: str = ""
    given_up: str = ""
    pinned: str = ""
    fits: Callable[[M], bool] | None = None


class Members(msgspec.Struct, Generic[M]):
    """The pools as they are now: the backends that are up, not ejected, and have the request's model.

    Attributes:
        configured: the number of backends that each pool has for the request, whether up or not.
        pairs: whether a prefill backend may hand over to a decode backend; None where every pair is possible.
        bounded: whether backends have bounds.
    """

    prefill: Sequence[M]
    decode: Sequence[M]
    mixed: Sequence[M]
    configured: Mapping[str, int]
    pairs: Callable[[M, M], bool] | None = None
    bounded: bool = False


class Eligible(msgspec.Struct, Generic[M], frozen=True):
    """The backends that are eligible for a request.

    Attributes:
        view: the backends, for `decide`.
        unsplittable: why the request cannot be split, or empty.
    """

    view: View[M]
    unsplittable: str


def eligible(members: Members[M], needs: Needs[M], rules: Rules) -> Eligible[M]:
    """The backends that pass all rules.

    Two rules do not apply where no backend would be left: the bounds of backends, and whether an engine family has an
    endpoint that several families have.
    """
    prefill, decode, mixed, pairs = members.prefill, members.decode, members.mixed, members.pairs
    if members.bounded:
        prefill = _with_capacity(prefill, needs.prefill_tokens)
        decode, mixed = _with_capacity(decode, needs.decode_tokens), _with_capacity(mixed, needs.decode_tokens)
        if pairs is not None and not any(pairs(p, d) for d in decode for p in prefill):
            # Those with capacity may not form a pair; a pair that is full is better than none.
            prefill, decode = members.prefill, members.decode
    plain: Sequence[M] | None = None
    if needs.fits is not None:
        fits = needs.fits
        prefill, decode, mixed = ([b for b in pool if fits(b)] for pool in (prefill, decode, mixed))
    if not rules.all_plain:
        plain = [b for b in decode if b.connector in rules.plain]
    unsplittable = needs.unsplittable
    if unsplittable in rules.splits_somewhere or needs.endpoint not in rules.endpoints_everywhere:
        able = [b for b in prefill if _splits(b, needs, rules)]
        if able or unsplittable in rules.splits_everywhere:
            prefill, unsplittable = able, ""
        else:
            unsplittable = unsplittable or "endpoint"
        if needs.of_one_family:
            decode, mixed = _of_its_family(decode, needs, rules), _of_its_family(mixed, needs, rules)
            plain = None if plain is None else _of_its_family(plain, needs, rules)
            prefill, unsplittable = able, needs.unsplittable  # without such a prefill engine, it is a pool that is down
        else:
            decode, mixed = _offering(decode, needs.path), _offering(mixed, needs.path)
            plain = None if plain is None else _offering(plain, needs.path)
    if needs.pinned:
        url = needs.pinned
        prefill = ()
        decode, mixed = [b for b in decode if b.url == url], [b for b in mixed if b.url == url]
        plain = None if plain is None else [b for b in plain if b.url == url]
    if not unsplittable and not needs.ranked and any(b.ranks and b.connector in rules.negotiates for b in prefill):
        unsplittable = "data_parallel"  # the prefill leg cannot carry its rank, so decode would ask the wrong one
    if needs.given_up and not unsplittable and (mixed or plain is None or plain):
        unsplittable = needs.given_up
    return Eligible(
        View(prefill, decode, mixed, members.configured, None if needs.pinned else pairs, plain), unsplittable
    )


def _with_capacity(pool: Sequence[M], tokens: int) -> Sequence[M]:
    return pool if len(pool) < 2 else [b for b in pool if b.has_capacity(tokens)] or pool


def _splits(backend: Member, needs: Needs[Any], rules: Rules) -> bool:
    """Whether a prefill backend can serve the request's prefill leg."""
    connector = backend.connector
    return needs.endpoint in rules.endpoints[connector] and (
        not needs.unsplittable or needs.unsplittable in rules.splits[connector]
    )


def _has_endpoint(backend: Member, needs: Needs[Any], rules: Rules) -> bool:
    return needs.path in backend.kind.routes or needs.endpoint in rules.endpoints[backend.connector]


def _of_its_family(pool: Sequence[M], needs: Needs[M], rules: Rules) -> Sequence[M]:
    """The backends of the one engine family that has the request's endpoint."""
    return [b for b in pool if _has_endpoint(b, needs, rules)]


def _offering(pool: Sequence[M], path: str) -> Sequence[M]:
    """The backends whose engine family has the request's endpoint; all where none has, so that an engine answers."""
    return [b for b in pool if b.offers(path)] or pool


def left_out(
    pools: Mapping[str, Sequence[M]],
    members: Members[M],
    needs: Needs[M],
    rules: Rules,
    *,
    avoid: AbstractSet[str] = frozenset(),
    now: float = 0.0,
) -> list[tuple[M, Rule]]:
    """The backends that are not eligible for a request, each with the first rule that excludes it.

    Arguments:
        pools: all members of the prefill, decode and mixed pools, in any state.
        members, needs, rules: as for `eligible`.
        avoid: the URLs of backends that failed the request.
        now: the time in seconds, on the fleet's clock.
    """
    found = eligible(members, needs, rules)
    view = found.view
    kept: dict[str, Sequence[M]] = {"prefill": view.prefill, "decode": view.decode, "mixed": view.mixed}
    serving: dict[str, Sequence[M]] = {"prefill": members.prefill, "decode": members.decode, "mixed": members.mixed}
    rest: list[tuple[M, Rule]] = []
    for role, pool in kept.items():
        among, served = set(map(id, pool)), set(map(id, serving[role]))
        for backend in pools.get(role, ()):
            rule = (
                _last_rules(backend, role, found, avoid)
                if id(backend) in among
                else _first_rule(backend, role, id(backend) in served, members, needs, rules, now)
            )
            if rule is not None:
                rest.append((backend, rule))
    return rest


def _first_rule(
    backend: M, role: str, serves: bool, members: Members[M], needs: Needs[M], rules: Rules, now: float
) -> Rule:
    """The rule that excludes a backend that `eligible` has not returned.

    Arguments:
        serves: whether it is in `members`.
    """
    if backend.draining:
        return "draining"
    if not backend.up:
        return "down"
    if not backend.serves(needs.model):
        return "model"
    if not serves:
        return "resting" if backend.resting_until > now else "ejected"
    tokens = needs.prefill_tokens if role == "prefill" else needs.decode_tokens
    if members.bounded and not backend.has_capacity(tokens):
        return "full"
    if needs.fits is not None and not needs.fits(backend):
        return "weights"
    if needs.pinned and (role == "prefill" or backend.url != needs.pinned):
        return "pinned"
    return "connector" if role == "prefill" else "endpoint"


def _last_rules(backend: M, role: str, found: Eligible[M], avoid: AbstractSet[str]) -> Rule | None:
    """The rule that excludes a backend that `eligible` has returned; None where the policy compares it."""
    view = found.view
    if role == "prefill" and found.unsplittable:
        return "unsplit"
    pairs = view.pairs
    if pairs is not None and not found.unsplittable:
        if role == "prefill" and not any(pairs(backend, other) for other in view.decode):
            return "pairing"
        if role == "decode" and view.prefill and not any(pairs(other, backend) for other in view.prefill):
            return "pairing"
    pool = {"prefill": view.prefill, "decode": view.decode, "mixed": view.mixed}[role]
    return "avoided" if backend.url in avoid and any(other.url not in avoid for other in pool) else None
