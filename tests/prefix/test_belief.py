"""The prefix index compared with a cache that works as an engine's does."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from pd_proxy.prefix.chain import Chain, chain_of_ids, root_of_ids
from pd_proxy.prefix.index import PrefixIndex

KEY = b"k" * 16
ROOT = root_of_ids("m", KEY)


class Engine:
    """A cache of blocks of 16 tokens by their chained hashes. The oldest are evicted first, and of a prompt the
    last."""

    def __init__(self, tokens: int) -> None:
        self.blocks = tokens // 16
        self.cache: OrderedDict[int, None] = OrderedDict()

    def compute(self, ids: list[int]) -> int:
        """Compute a prompt; returns the tokens that were cached. All of it is cached then."""
        chained, hashed = [], 0
        for start in range(0, len(ids) - 15, 16):
            hashed = hash((hashed, *ids[start : start + 16]))
            chained.append(hashed)
        found = next((number for number, one in enumerate(chained) if one not in self.cache), len(chained))
        for one in reversed(chained):
            self.cache[one] = None
            self.cache.move_to_end(one)
        while len(self.cache) > self.blocks:
            self.cache.popitem(last=False)
        return min(found * 16, (len(ids) - 1) // 16 * 16)


def sessions(chosen: random.Random, count: int) -> list[list[int]]:
    """Prompts of sessions that go on and of some that begin anew, in turn."""
    system = chosen.choices(range(1000), k=600)
    live: list[list[int]] = []
    prompts = []
    for _ in range(count):
        if len(live) < 12 or chosen.random() < 0.1:
            live.append([*system, *chosen.choices(range(1000), k=100)])
            live = live[-40:]
        session = chosen.choice(live)
        session += chosen.choices(range(1000), k=chosen.randrange(50, 400))
        prompts.append(list(session))
    return prompts


@pytest.mark.parametrize(("capacity", "told"), [(100_000, 100_000), (30_000, 30_000), (30_000, 60_000)])
def test_the_believed_tokens_are_close_to_those_that_the_engine_finds(capacity: int, told: int) -> None:
    """Also where the engine holds half of what it says, and where it is restarted without notice."""
    chosen = random.Random(capacity + told)
    engine, index = Engine(capacity), PrefixIndex()
    index.join("a", told)
    found, wrong, restart = 0, 0, 0
    for number, ids in enumerate(sessions(chosen, 240)):
        if number == 160:
            engine.cache.clear()
            restart = index.tokens("a")
        chain: Chain = chain_of_ids(ids, ROOT, KEY)
        expected = index.cached(chain).get("a", 0)
        index.enter("a", chain)
        finds = engine.compute(ids)
        index.correct("a", chain, finds, len(ids))
        if number == 160:
            assert index.tokens("a") < 0.1 * restart
        found, wrong = found + finds, wrong + abs(expected - finds)
    assert found > 0
    assert wrong < (0.04 if told == capacity else 0.08) * found
