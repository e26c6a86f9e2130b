"""The rings of shared memory by which workers know which prompts the others sent to which engine."""

from __future__ import annotations

import os
import random

import msgspec
import pytest
from pd_proxy.prefix.chain import Chain, chain_of, chain_of_ids, root_of_ids
from pd_proxy.prefix.index import PrefixIndex, rank_name
from pd_proxy.requests.body import read_body
from pd_proxy.workers.prefix_ring import PeerPrefixes, PrefixRings

ENGINES = ["http://a", "http://b"]


class Worker:
    """One worker's index, and its end of the rings."""

    def __init__(self, rings: PrefixRings, number: int, engines: list[str] = ENGINES) -> None:
        self.index = PrefixIndex()
        for engine in engines:
            self.index.join(engine, 1_000_000_000)
        self.peers = PeerPrefixes(rings, number, self.index)


def prompt(rings: PrefixRings, number: int, size: int = 3000) -> Chain:
    said = f"{number} {'word ' * (size // 5)}"
    return chain_of(read_body(msgspec.json.encode({"model": "m", "prompt": said}), "completions"), rings.key)


def test_each_worker_learns_which_prompts_the_others_sent() -> None:
    rings = PrefixRings(3)
    workers = [Worker(rings, number) for number in range(3)]
    text, ids = prompt(rings, 1), chain_of_ids(range(200), root_of_ids("m", rings.key), rings.key)
    workers[0].index.enter("http://a", text)
    workers[1].index.enter("http://b", text)
    workers[2].index.enter("http://b", ids)
    for worker in workers:
        worker.peers.read()
        worker.peers.read()
    believed = text.tokens_of(len(text.hashes))
    for worker in workers:
        assert worker.index.cached(text) == dict.fromkeys(ENGINES, believed)
        assert worker.index.cached(ids) == {"http://b": 192}
        assert worker.index.figures(0).entries == 2 * len(text.hashes) + len(ids.hashes)
        assert worker.peers.lost == 0


def test_each_worker_learns_to_which_rank_the_others_sent_a_prompt() -> None:
    rings, names = PrefixRings(2), [rank_name("http://a", rank) for rank in range(3)]
    one, other = Worker(rings, 0, names), Worker(rings, 1, names)
    chain = prompt(rings, 1)
    one.index.enter(names[1], chain)
    other.peers.read()
    assert other.index.cached(chain).keys() == {names[1]}
    one.index.clear(names[1])
    other.peers.read()
    assert not other.index.cached(chain)


def test_a_loss_that_one_worker_finds_is_learnt_by_all() -> None:
    rings = PrefixRings(2)
    one, other = Worker(rings, 0), Worker(rings, 1)
    old, asked = prompt(rings, 1), prompt(rings, 2)
    for chain in (old, asked):
        one.index.enter("http://a", chain)
        one.index.settle("http://a", chain)
    again = msgspec.structs.replace(asked)
    one.index.enter("http://a", again)
    other.peers.read()
    assert other.index.cached(old)
    one.index.correct("http://a", again, 0, 750)
    other.peers.read()
    assert not other.index.cached(old)
    assert other.index.cached(asked)
    one.index.clear("http://a")
    other.peers.read()
    assert not other.index.cached(asked)


def test_records_of_an_unknown_engine_are_ignored() -> None:
    rings = PrefixRings(2)
    one, other = Worker(rings, 0), Worker(rings, 1, ["http://b"])
    chains = [prompt(rings, number) for number in range(2)]
    one.index.enter("http://a", chains[0])
    other.peers.read()
    assert not other.index.cached(chains[0])
    other.index.join("http://a", 1_000_000)
    one.index.enter("http://a", chains[1])
    other.peers.read()
    assert set(other.index.cached(chains[1])) == {"http://a"}
    other.index.leave("http://a")
    one.index.enter("http://a", chains[1])
    other.peers.read()
    assert other.index.figures(0).entries == 0


def test_a_reader_that_was_overtaken_counts_missed_records_and_goes_on() -> None:
    rings = PrefixRings(2, cells=64)
    one, other = Worker(rings, 0), Worker(rings, 1)
    chains = [prompt(rings, number) for number in range(40)]
    for chain in chains:
        one.index.enter("http://a", chain)
    other.peers.read()
    known = [bool(other.index.cached(chain)) for chain in chains]
    assert known == sorted(known), "those that were written last"
    assert 0 < sum(known) <= 64 // (4 + len(chains[0].hashes))
    assert other.peers.lost > 0
    one.index.enter("http://a", chains[0])
    other.peers.read()
    assert other.index.cached(chains[0])


@pytest.mark.parametrize("cells", [64, 128, 4096])
def test_readers_that_keep_up_miss_nothing(cells: int) -> None:
    rings = PrefixRings(2, cells=cells)
    one, other = Worker(rings, 0), Worker(rings, 1)
    chosen = random.Random(cells)
    for number in range(200):
        chain = prompt(rings, number, chosen.randrange(600, 6000))
        one.index.enter(chosen.choice(ENGINES), chain)
        other.peers.read()
        assert other.index.cached(chain) == one.index.cached(chain)
    assert other.peers.lost == 0


def test_many_records_are_read_in_pieces() -> None:
    rings = PrefixRings(2)
    one, other = Worker(rings, 0), Worker(rings, 1)
    chains = [prompt(rings, number, 400_000) for number in range(80)]
    for chain in chains:
        one.index.enter("http://a", chain)
    other.peers.read()
    assert 20 < sum(bool(other.index.cached(chain)) for chain in chains) < 60
    other.peers.read()
    assert all(other.index.cached(chain) for chain in chains)
    assert other.peers.lost == 0


def test_a_very_long_prompt_is_cut_to_the_size_of_a_record() -> None:
    rings = PrefixRings(2, cells=64)
    one, other = Worker(rings, 0), Worker(rings, 1)
    chain = prompt(rings, 1, 100_000)
    one.index.enter("http://a", chain)
    other.peers.read()
    assert other.index.cached(chain) == {"http://a": chain.tokens_of(16)}


def test_records_are_shared_across_a_fork() -> None:
    rings = PrefixRings(2)
    chains = [prompt(rings, number) for number in range(5)]
    child = os.fork()
    if child == 0:
        worker = Worker(rings, 0)
        for chain in chains:
            worker.index.enter("http://a", chain)
        os._exit(0)
    os.waitpid(child, 0)
    worker = Worker(rings, 1)
    worker.peers.read()
    assert all(worker.index.cached(chain) for chain in chains)


def test_a_reader_beside_a_writer_in_another_process_never_enters_what_was_not_sent() -> None:
    rings = PrefixRings(2, cells=256)  # so that the writer overtakes the reader repeatedly
    chains = [prompt(rings, number, 600 + 97 * number % 9000) for number in range(50)]
    sent = {hashed for chain in chains for hashed in chain.hashes}
    started, starting = os.pipe()
    child = os.fork()
    if child == 0:
        writer = Worker(rings, 0)
        os.write(starting, b"x")
        for number in range(3000):
            writer.index.enter("http://a", chains[number % len(chains)])
        os._exit(0)
    os.read(started, 1)
    reader = Worker(rings, 1)
    looks = 0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        reader.peers.read()
        looks += 1
    reader.peers.read()
    assert set(reader.index._blocks.holders) <= sent
    assert reader.index.cached(chains[2999 % len(chains)])
    os.close(started)
    os.close(starting)


def test_a_worker_that_died_while_it_wrote_is_wiped_and_another_goes_on() -> None:
    rings = PrefixRings(2, cells=64)
    dead, living = Worker(rings, 0), Worker(rings, 1)
    chains = [prompt(rings, number) for number in range(3)]
    dead.index.enter("http://a", chains[0])
    rings._cells[0] += 60  # it had announced a record, and written a part of it
    rings._cells[4 + rings.end(0)] = 12345
    early = Worker(rings, 1)
    early.peers.read()
    assert not early.index.cached(chains[0]), "what it read may have been half of one thing and half of another"
    assert early.peers.lost > 0
    rings.wipe(0)
    living.peers.read()
    assert living.index.cached(chains[0]), "the engine has it still"
    living.index.enter("http://b", chains[1])
    another = Worker(rings, 0)
    another.peers.read()
    assert another.index.cached(chains[0]) and another.index.cached(chains[1])
    another.index.enter("http://a", chains[2])
    living.peers.read()
    assert living.index.cached(chains[2])
    assert living.peers.lost == another.peers.lost == 0


def test_impossible_values_in_shared_memory_are_skipped() -> None:
    rings = PrefixRings(2, cells=64)
    one, other = Worker(rings, 0), Worker(rings, 1)
    chains = [prompt(rings, number) for number in range(4)]
    for cell, value in ((4, 99), (5, -1), (7, 0x7FF0000000000000)):  # the record's place, length and scale
        place = rings.end(0) % 64
        one.index.enter("http://a", chains[0])
        rings._cells[place + cell] = value
        other.peers.read()
        assert not other.index.cached(chains[0])
        rings._cells[place + 5] = 1 << 32 | len(chains[0].hashes)
    one.index.enter("http://a", chains[3])
    other.peers.read()
    assert other.index.cached(chains[3])
