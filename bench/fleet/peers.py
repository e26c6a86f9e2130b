"""Other gateways' rules, written anew, with their defaults as thresholds.

The sources are vllm-project/router (cache_aware.rs, kv_aware.rs, consistent_hash.rs, power_of_two.rs) and
lightseekorg/smg (cache_aware, least_load.rs). Where a rule leaves something open, the reading that favours it is taken:
loads are exact, trees are never too large, KV events arrive at once.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from hashlib import blake2b
from random import Random

from bench.fleet.blocks import BLOCK
from bench.fleet.fleet import Fleet
from bench.fleet.jobs import Job

CACHE_THRESHOLD = 0.3
"""Share of a prompt that has to match; below it, load decides."""
ABSOLUTE, RELATIVE = 64, 1.5
"""Load decides when the busiest engine exceeds the idlest one by this number of requests and by this factor."""
SPECULATIVE = 2.0
"""Seconds for which kv_aware counts the prompts that it has sent as cached before a KV event says so."""
_POINTS = 160  # points of each engine on the hash ring


class Pool:
    """One role's engines with their load, as a peer counts it."""

    def __init__(self, count: int) -> None:
        self.load = [0] * count
        self.up = [True] * count

    def indices(self) -> list[int]:
        """Engines that accept requests."""
        return [index for index, up in enumerate(self.up) if up]

    def least(self) -> int:
        """The engine with the fewest requests; the first of equals."""
        return min(self.indices(), key=self.load.__getitem__)


Rule = Callable[[Job], int]


class Tree:
    """A prefix tree of texts, by blocks: the engine to which each block was sent last."""

    def __init__(self) -> None:
        self._owners: dict[int, int] = {}

    def match(self, said: Sequence[int]) -> tuple[int, int]:
        """How many blocks match, and the engine of the last of them; -1 without a match."""
        owners, low, high = self._owners, 0, len(said)
        while low < high:
            middle = (low + high + 1) // 2
            if said[middle - 1] in owners:
                low = middle
            else:
                high = middle - 1
        return low, owners[said[low - 1]] if low else -1

    def enter(self, said: Sequence[int], engine: int) -> None:
        """Note that a text was sent to an engine."""
        self._owners.update(dict.fromkeys(said, engine))

    def forget(self, engine: int) -> None:
        """Remove all blocks of an engine."""
        self._owners = {block: owner for block, owner in self._owners.items() if owner != engine}


class Peer:
    """A router with a rule for each pool.

    Arguments:
        prefill, decode: `cache_aware`, `kv_aware`, `consistent_hash`, `least_load`, `random` or `round_robin`.
    """

    def __init__(self, prefill: str, decode: str, seed: int = 0) -> None:
        self._rules = (prefill, decode)
        self._random = Random(seed)
        self._turn = 0

    def start(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._pools = (Pool(len(fleet.prefill)), Pool(len(fleet.decode)))
        self._trees = (Tree(), Tree())
        self._rings = tuple(_ring(len(pool.load)) for pool in self._pools)
        self._sent: dict[int, tuple[int, float]] = {}

    def place(self, job: Job) -> None:
        job.prefill, job.decode = self._choose(0, job), self._choose(1, job)
        fleet = self._fleet
        job.prefill_rank = _idlest(fleet.prefill[job.prefill])
        job.decode_rank = _idlest(fleet.decode[job.decode])
        self._pools[0].load[job.prefill] += 1
        self._pools[1].load[job.decode] += 1

    def prefilled(self, job: Job) -> None:
        self._pools[0].load[job.prefill] -= 1

    def first(self, job: Job) -> None:
        pass

    def ended(self, job: Job) -> None:
        self._pools[1].load[job.decode] -= 1

    def failed(self, job: Job) -> None:
        self.prefilled(job)
        self.ended(job)

    def changed(self, engine: int, up: bool) -> None:
        self._pools[0].up[engine] = up
        if not up:
            self._trees[0].forget(engine)

    def _choose(self, which: int, job: Job) -> int:
        rule, pool = self._rules[which], self._pools[which]
        if rule == "cache_aware":
            return self._cache_aware(pool, self._trees[which], job.request.prompt.chain.hashes)
        if rule == "kv_aware":
            return self._kv_aware(pool, job)
        if rule == "consistent_hash":
            return _of_ring(
                self._rings[which], job.request.session or str(job.request.prompt.chain.hashes[-1:]).encode(), pool
            )
        if rule == "least_load":
            return pool.least()
        places = pool.indices()
        if rule == "random":
            return self._random.choice(places)
        self._turn += 1
        return places[self._turn % len(places)]

    @staticmethod
    def _cache_aware(pool: Pool, tree: Tree, said: Sequence[int]) -> int:
        """The engine that was sent most of this prompt, unless too little of it matches or loads differ too much."""
        loads = [pool.load[index] for index in pool.indices()]
        most, least = max(loads), min(loads)
        matched, owner = tree.match(said)
        if most - least > ABSOLUTE and most > RELATIVE * least:
            chosen = pool.least()
        elif said and matched / len(said) > CACHE_THRESHOLD and pool.up[owner]:
            chosen = owner
        else:
            chosen = pool.least()
        tree.enter(said, chosen)
        return chosen

    def _kv_aware(self, pool: Pool, job: Job) -> int:
        """The engine that holds most of the prompt, whatever its load; of equals the idlest."""
        prompt, now, engines = job.request.prompt, self._fleet.clock.now, self._fleet.prefill
        sent, believed = self._sent, [0] * len(engines)
        for place in range(len(prompt.blocks), 0, -1):
            entry = sent.get(prompt.blocks[place - 1])
            if entry is not None and entry[1] > now:
                believed[entry[0]] = place * BLOCK
                break
        for index in pool.indices():
            held = max(rank.cache.matched(prompt.blocks) for rank in engines[index])
            believed[index] = max(believed[index], held)
        best = min(pool.indices(), key=lambda index: (-believed[index], pool.load[index]))
        sent.update(dict.fromkeys(prompt.blocks, (best, now + SPECULATIVE)))
        return best


def _idlest(ranks: Sequence[object]) -> int:
    """The rank that the engine itself would choose: the one with the least work."""
    if len(ranks) == 1:
        return 0
    return min(range(len(ranks)), key=lambda rank: ranks[rank].waiting_work)  # type: ignore[attr-defined]


def _ring(count: int) -> list[tuple[int, int]]:
    return sorted((_digest(b"%d %d" % (engine, point)), engine) for engine in range(count) for point in range(_POINTS))


def _of_ring(ring: list[tuple[int, int]], key: bytes, pool: Pool) -> int:
    """The first engine that is up, at or after a key on the ring."""
    place = bisect(ring, (_digest(key), 0))
    for step in range(len(ring)):
        engine = ring[(place + step) % len(ring)][1]
        if pool.up[engine]:
            return engine
    raise AssertionError("no engine is up")


def _digest(key: bytes) -> int:
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big")


PEERS: dict[str, Callable[[], Peer]] = {
    "vllm-router cache_aware": lambda: Peer("cache_aware", "cache_aware"),
    "vllm-router kv_aware": lambda: Peer("kv_aware", "random"),
    "vllm-router consistent_hash": lambda: Peer("consistent_hash", "consistent_hash"),
    "smg cache_aware": lambda: Peer("cache_aware", "least_load"),
    "smg least_load": lambda: Peer("least_load", "least_load"),
}
