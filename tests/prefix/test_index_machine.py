"""For any sequence of events, the index believes what a plain list of uses says."""

from __future__ import annotations

from itertools import takewhile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pd_proxy.prefix.blocks import growing
from pd_proxy.prefix.chain import Chain
from pd_proxy.prefix.index import PrefixIndex

BLOCKS = growing(((4, 2), (16, 4)))
TEXTS = ["", "aabb", "aaaa", "aabbcccc", "aabbccccdddd", "aabbcccceeee", "aaaabbbb", "ccccdddd", "aabbccccddddffff"]
ENGINES = ["a", "b", "c"]
MOST = 9

texts = st.sampled_from(TEXTS)
engines = st.sampled_from(ENGINES)


def chain_of(text: str, exact: bool = True) -> Chain:
    ends = BLOCKS.ends[: BLOCKS.whole(len(text))]
    hashes = tuple(int.from_bytes(text[:end].encode(), "big") % (2**64 - 59) for end in ends)
    return Chain(hashes, len(text), len(text), 1.0, BLOCKS, exact)


class Use:
    """A block that an engine holds in the model: the last use of the text up to its end."""

    def __init__(self, text: str, size: int, ordinal: int, elsewhere: bool) -> None:
        self.text, self.size, self.ordinal, self.elsewhere = text, size, ordinal, elsewhere


class Model:
    """One engine: its blocks, the least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = self.limit = capacity
        self.part = 1.0
        self.uses: list[Use] = []
        self.caching = True
        self.blind = False
        self.misses = 0
        self.sent: list[tuple[Chain, str, int, int, list[Use]]] = []  # with ordinal, first uncomputed ordinal, believed
        self.computed: set[int] = set()

    def tokens(self) -> int:
        return sum(use.size for use in self.uses)

    def prefix(self, text: str) -> list[Use]:
        """The cached part of a text, first block first."""
        held = {use.text: use for use in self.uses}
        return [held[part] for part in takewhile(held.__contains__, parts(text))]

    def use(self, text: str, count: int, ordinal: int, elsewhere: bool, share: int) -> None:
        for number in reversed(range(count)):
            part = parts(text)[number]
            self.uses = [use for use in self.uses if use.text != part]
            self.uses.append(Use(part, BLOCKS.sizes[number], ordinal, elsewhere))
        self.fit(share)

    def fit(self, share: int) -> None:
        while self.tokens() > self.limit or len(self.uses) > share:
            self.uses.pop(0)


def parts(text: str) -> list[str]:
    return [text[:end] for end in BLOCKS.ends[: BLOCKS.whole(len(text))]]


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(most_entries=MOST)
        self.model: dict[str, Model] = {}
        self.ordinal = 0

    @property
    def share(self) -> int:
        return MOST // max(1, len(self.model))

    @rule(engine=engines, capacity=st.integers(1, 40), caching=st.booleans())
    def join(self, engine: str, capacity: int, caching: bool) -> None:
        self.index.join(engine, capacity, caching)
        model = self.model.setdefault(engine, Model(capacity))
        model.capacity, model.limit = capacity, int(capacity * model.part)
        if not caching:
            model.uses, model.sent = [], []
        elif not model.caching:
            model.blind = False
        model.caching = caching
        model.fit(self.share)

    @precondition(lambda self: self.model)
    @rule(engine=engines)
    def leave(self, engine: str) -> None:
        self.index.leave(engine)
        self.model.pop(engine, None)

    @rule(engine=engines)
    def clear(self, engine: str) -> None:
        self.index.clear(engine)
        if model := self.model.get(engine):
            model.uses, model.sent, model.misses, model.blind = [], [], 0, False

    @precondition(lambda self: self.model)
    @rule(engine=engines, text=texts, exact=st.booleans())
    def enter(self, engine: str, text: str, exact: bool) -> None:
        chain = chain_of(text, exact)
        self.index.enter(engine, chain)
        model = self.model.get(engine)
        if model is None or not model.caching or model.blind or not chain.hashes:
            return
        self.ordinal += 1
        first = min((sent[2] for sent in model.sent if sent[2] not in model.computed), default=self.ordinal)
        model.sent.append((chain, text, self.ordinal, first, model.prefix(text)))
        model.use(text, len(chain.hashes), self.ordinal, False, self.share)

    @precondition(lambda self: any(model.sent for model in self.model.values()))
    @rule(data=st.data(), cached=st.integers(-1, 18), total=st.sampled_from([16, 16, 16, 8, 1, 0]))
    def correct(self, data: st.DataObject, cached: int, total: int) -> None:
        engine = data.draw(st.sampled_from([name for name, model in self.model.items() if model.sent]))
        model = self.model[engine]
        chain, text, _, first, believed = model.sent.pop(data.draw(st.integers(0, len(model.sent) - 1)))
        self.index.correct(engine, chain, cached, total)
        if not 0 <= cached <= total or not total:
            return
        if model.blind and not cached:
            return
        if model.blind:
            model.blind, model.misses = False, 0
        share = cached / total * len(text)
        length = len(believed[-1].text) if believed else 0
        size = believed[-1].size if believed else BLOCKS.sizes[0]
        slack = size if chain.exact else size + length / 4
        if share + slack >= length:
            model.misses = 0
            model.part += (1 - model.part) / (16 if share > length + slack else 256)
            model.limit = int(model.capacity * model.part)
            return
        lost = next(use for use in believed if len(use.text) > share + slack)
        if lost.elsewhere or lost.ordinal >= first:
            return
        model.uses = [use for use in model.uses if use.ordinal > lost.ordinal]
        model.part = max(0.25, min(model.part, max(0.8 * model.part, model.tokens() / model.capacity)))
        model.limit = int(model.capacity * model.part)
        model.misses = 0 if cached else model.misses + 1
        if model.misses >= 8:
            model.uses, model.sent, model.blind = [], [], True

    @precondition(lambda self: any(model.sent for model in self.model.values()))
    @rule(data=st.data())
    def computed(self, data: st.DataObject) -> None:
        engine = data.draw(st.sampled_from([name for name, model in self.model.items() if model.sent]))
        chain, _, ordinal, _, _ = data.draw(st.sampled_from(self.model[engine].sent))
        self.index.computed(engine, chain)
        self.model[engine].computed.add(ordinal)

    @precondition(lambda self: any(model.sent for model in self.model.values()))
    @rule(data=st.data(), computed=st.booleans())
    def end(self, data: st.DataObject, computed: bool) -> None:
        engine = data.draw(st.sampled_from([name for name, model in self.model.items() if model.sent]))
        model = self.model[engine]
        chain, text, ordinal, _, believed = model.sent.pop(data.draw(st.integers(0, len(model.sent) - 1)))
        if computed:
            self.index.settle(engine, chain)
            return
        self.index.withdraw(engine, chain)
        new = parts(text)[len(believed) :]
        model.uses = [use for use in model.uses if use.ordinal != ordinal or use.text not in new]

    @precondition(lambda self: self.model)
    @rule(engine=engines, text=texts)
    def entered_elsewhere(self, engine: str, text: str) -> None:
        self.index.entered_elsewhere(engine, chain_of(text))
        model = self.model.get(engine)
        if model is not None and model.caching and not model.blind:
            self.ordinal += 1
            model.use(text, len(parts(text)), self.ordinal, True, self.share)

    @precondition(lambda self: self.model)
    @rule(engine=engines, tokens=st.integers(0, 30))
    def trimmed_elsewhere(self, engine: str, tokens: int) -> None:
        self.index.trimmed_elsewhere(engine, tokens)
        model = self.model.get(engine)
        while model is not None and model.tokens() > tokens:
            model.uses.pop(0)

    @precondition(lambda self: self.model)
    @rule(engine=engines, text=texts, count=st.integers(0, 5))
    def remove(self, engine: str, text: str, count: int) -> None:
        self.index.remove(engine, chain_of(text).hashes[count:])
        if model := self.model.get(engine):
            gone = parts(text)[count:]
            model.uses = [use for use in model.uses if use.text not in gone]

    @precondition(lambda self: self.model)
    @rule(engine=engines, text=texts)
    def store(self, engine: str, text: str) -> None:
        self.index.store(engine, chain_of(text).hashes, BLOCKS.sizes[: len(parts(text))])
        model = self.model.get(engine)
        if model is not None and model.caching:
            model.blind = False
            self.ordinal += 1
            model.use(text, len(parts(text)), self.ordinal, False, self.share)

    @invariant()
    def the_index_equals_the_list_of_uses(self) -> None:
        for text in TEXTS:
            held = {engine: model.prefix(text) for engine, model in self.model.items()}
            expected = {engine: len(uses[-1].text) for engine, uses in held.items() if uses}
            assert self.index.cached(chain_of(text)) == expected
        for engine, model in self.model.items():
            assert self.index.tokens(engine) == model.tokens()

    @invariant()
    def the_index_is_bounded_and_its_two_halves_agree(self) -> None:
        index = self.index
        held: dict[int, int] = {}
        for engine, one in index._engines.items():
            assert one.used <= one.capacity
            assert one.computing.keys() <= one.pending.keys()
            assert sum(value & 0x7FFF for value in one.entries.values()) == one.used
            assert index._blocks.urls[one.slot] == engine
            for hashed in one.entries:
                held[hashed] = held.get(hashed, 0) | one.bit
        assert index._blocks.holders == held
        assert len(index._blocks.urls) <= len(ENGINES)


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=12, stateful_step_count=20)


@pytest.mark.slow
def test_the_machine_with_long_runs() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(IndexMachine, settings=settings(max_examples=400, stateful_step_count=60))
