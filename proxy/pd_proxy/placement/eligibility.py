"""Who may be given a request, before any policy compares them; and for everybody else, which rule left it out.

Pure functions over backends and what the request needs. `eligible` is on the path of every request: where engines are
all alike and the request is an ordinary one, it looks at nobody. `left_out` asks the same rules backend by backend, and
is called only for somebody who wants to know.
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
"""Why a backend may not be given a request.

`down`, `draining`: so it is. `model`: it does not have the request's. `ejected`: by the breaker. `resting`: it has said
that it is busy. `full`: the request would put it above its bounds. `weights`: the answer was begun by an engine with
others. `connector`: of its hand-off protocol, prefill cannot share such a request. `endpoint`: it does not have the
request's route. `pinned`: another backend has what the request goes on from. `unsplit`: it prefills, and the request
is served whole. `pairing`: none of the other half of a pair fits it. `avoided`: it has failed this request, and others
have not.
"""


class Kind(Protocol):
    """A backend's kind."""

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
    """What the connectors of a gateway can do; the same for all requests.

    Attributes:
        splits: by connector, the reasons of `Body.alone` that are none to its engines.
        endpoints: by connector, those whose requests are split.
        plain: the connectors whose decode engines answer without a hand-off.
        meets: those whose legs are told of each other, ranks included.
        all_plain: every connector in use is plain.
        splits_somewhere, splits_everywhere: the reasons that are none to some, to all that are in use.
        endpoints_everywhere: those that all connectors in use split, and that all kinds of engine have.
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
        model: None where it names none.
        prefill_tokens, decode_tokens: what its legs put on their backends.
        endpoint: its name, and `path` where engines serve it.
        of_one_make: only the engines of one make have the endpoint.
        ranked: a leg of it can be told the data-parallel rank that it is for.
        alone: why its body cannot be split, or empty.
        given_up: why it is not split any more after its failures, or empty.
        pinned: URL of the only backend that can serve it, or empty.
        fits: whether a backend may go on with its answer, where it was begun; None where it was not.
    """

    model: str | None
    prefill_tokens: int
    decode_tokens: int
    endpoint: str
    path: str
    of_one_make: bool = False
    ranked: bool = True
    alone: str = ""
    given_up: str = ""
    pinned: str = ""
    fits: Callable[[M], bool] | None = None


class Members(msgspec.Struct, Generic[M]):
    """The pools as they are now: who is up, fit by the breaker's word, and has the request's model.

    Attributes:
        configured: how many backends each pool has for the request, up or not.
        pairs: whether a prefill backend may hand over to a decode backend; None where any may to any.
        bounded: backends have bounds.
    """

    prefill: Sequence[M]
    decode: Sequence[M]
    mixed: Sequence[M]
    configured: Mapping[str, int]
    pairs: Callable[[M, M], bool] | None = None
    bounded: bool = False


class Eligible(msgspec.Struct, Generic[M], frozen=True):
    """Who may be given a request.

    Attributes:
        view: the backends, for `decide`.
        alone: why it cannot be split, or empty.
    """

    view: View[M]
    alone: str


def eligible(members: Members[M], needs: Needs[M], rules: Rules) -> Eligible[M]:
    """Who may be given a request: for each rule those that pass it. Bounds, and kinds of engine for endpoints that
    several have, leave nobody out where nobody would be left."""
    prefill, decode, mixed, pairs = members.prefill, members.decode, members.mixed, members.pairs
    if members.bounded:
        prefill = _with_capacity(prefill, needs.prefill_tokens)
        decode, mixed = _with_capacity(decode, needs.decode_tokens), _with_capacity(mixed, needs.decode_tokens)
        if pairs is not None and not any(pairs(p, d) for d in decode for p in prefill):
            # Those with room may be of different groups; a full pair is better than none.
            prefill, decode = members.prefill, members.decode
    plain: Sequence[M] | None = None
    if needs.fits is not None:
        fits = needs.fits
        prefill, decode, mixed = ([b for b in pool if fits(b)] for pool in (prefill, decode, mixed))
    if not rules.all_plain:
        plain = [b for b in decode if b.connector in rules.plain]
    alone = needs.alone
    if alone in rules.splits_somewhere or needs.endpoint not in rules.endpoints_everywhere:
        able = [b for b in prefill if _splits(b, needs, rules)]
        if able or alone in rules.splits_everywhere:
            prefill, alone = able, ""
        else:
            alone = alone or "endpoint"
        if needs.of_one_make:
            decode, mixed = _of_its_make(decode, needs, rules), _of_its_make(mixed, needs, rules)
            plain = None if plain is None else _of_its_make(plain, needs, rules)
            prefill, alone = able, needs.alone  # where no such engine prefills, it is that it is down
        else:
            decode, mixed = _offering(decode, needs.path), _offering(mixed, needs.path)
            plain = None if plain is None else _offering(plain, needs.path)
    if needs.pinned:
        url = needs.pinned
        prefill = ()
        decode, mixed = [b for b in decode if b.url == url], [b for b in mixed if b.url == url]
        plain = None if plain is None else [b for b in plain if b.url == url]
    if not alone and not needs.ranked and any(b.ranks and b.connector in rules.negotiates for b in prefill):
        alone = "data_parallel"  # its legs would not find each other, since prefill's cannot be told its rank
    if needs.given_up and not alone and (mixed or plain is None or plain):
        alone = needs.given_up
    return Eligible(View(prefill, decode, mixed, members.configured, None if needs.pinned else pairs, plain), alone)


def _with_capacity(pool: Sequence[M], tokens: int) -> Sequence[M]:
    return pool if len(pool) < 2 else [b for b in pool if b.has_capacity(tokens)] or pool


def _splits(backend: Member, needs: Needs[Any], rules: Rules) -> bool:
    """Whether a prefill backend's engines share the request with decode."""
    connector = backend.connector
    return needs.endpoint in rules.endpoints[connector] and (not needs.alone or needs.alone in rules.splits[connector])


def _makes(backend: Member, needs: Needs[Any], rules: Rules) -> bool:
    return needs.path in backend.kind.routes or needs.endpoint in rules.endpoints[backend.connector]


def _of_its_make(pool: Sequence[M], needs: Needs[M], rules: Rules) -> Sequence[M]:
    """Those whose engines have the request's endpoint, where no other make has it."""
    return [b for b in pool if _makes(b, needs, rules)]


def _offering(pool: Sequence[M], path: str) -> Sequence[M]:
    """Those whose kind has the request's endpoint; all where none has, since engines say it best."""
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
    """The backends that may not be given a request, each with the first rule that left it out.

    Arguments:
        pools: all members of the prefill, decode and mixed pools, whatever their state.
        members, needs, rules: as for `eligible`.
        avoid: URLs of backends that failed the request.
        now: seconds, on the fleet's clock.
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
    """The rule by which a backend is not among the eligible.

    Arguments:
        serves: it is among the members.
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
    """The rule by which an eligible backend is not compared with others all the same, or None."""
    view = found.view
    if role == "prefill" and found.alone:
        return "unsplit"
    pairs = view.pairs
    if pairs is not None and not found.alone:
        if role == "prefill" and not any(pairs(backend, other) for other in view.decode):
            return "pairing"
        if role == "decode" and view.prefill and not any(pairs(other, backend) for other in view.prefill):
            return "pairing"
    pool = {"prefill": view.prefill, "decode": view.decode, "mixed": view.mixed}[role]
    return "avoided" if backend.url in avoid and any(other.url not in avoid for other in pool) else None
