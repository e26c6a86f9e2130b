"""What the prefix index costs: a prompt's chain of hashes, a look-up for all engines, an entry, memory.

In one process, without engines. Times are the least of some rounds, since the code's own cost is wanted and not that of
other load on the machine. Memory is what Python allocates for it, by tracemalloc.

    .venv/bin/python -m bench.prefix            prints tables, in Markdown
    .venv/bin/python -m bench.prefix --check    ends with 1 where one of the budgets is missed
"""

from __future__ import annotations

import argparse
import random
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from time import perf_counter

import msgspec
from pd_proxy.prefix.chain import Chain, chain_of
from pd_proxy.prefix.index import Journal, PrefixIndex
from pd_proxy.requests.body import Body, read_body
from pd_proxy.workers.prefix_ring import PeerPrefixes, PrefixRings

KEY = b"\1" * 16
SIZES = {"4 kB": 4_000, "40 kB": 40_000, "400 kB": 400_000, "4 MB": 4_000_000}
ENGINES = (8, 16, 64, 512)
WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he")
BUDGETS = {"4 kB": 30.0, "400 kB": 1000.0}  # µs for a chain
LOOKUP_BUDGET = 20.0  # µs for a prompt of 4 kB and 16 engines

_encode = msgspec.json.Encoder().encode


def text(size: int, seed: int = 0) -> str:
    """English words with this many bytes in total."""
    chosen = random.Random(seed)
    return " ".join(chosen.choices(WORDS, k=size // 4))[:size]


def chat(size: int, seed: int = 0) -> Body:
    """A conversation of turns of 2 kB."""
    turns = max(1, size // 2000)
    messages = [
        {"role": ("user", "assistant")[turn % 2], "content": text(size // turns - 40, seed + turn)}
        for turn in range(turns)
    ]
    return read_body(_encode({"model": "m", "messages": messages, "max_tokens": 100}), "chat")


def completion(size: int) -> Body:
    """A prompt of text."""
    return read_body(_encode({"model": "m", "prompt": text(size)}), "completions")


def ids(size: int) -> Body:
    """A prompt of token ids that takes this many bytes as JSON."""
    chosen = random.Random(size)
    count = int(size / 6.13)  # bytes of a number below 128,000, with its comma
    return read_body(_encode({"model": "m", "prompt": chosen.choices(range(128_000), k=count)}), "completions")


def least(run: Callable[[], object], rounds: int = 7, seconds: float = 0.02) -> float:
    """Microseconds of one call, in the fastest of some rounds."""
    began = perf_counter()
    run()
    count = max(1, int(seconds / max(1e-9, perf_counter() - began)))
    best = float("inf")
    for _ in range(rounds):
        began = perf_counter()
        for _ in range(count):
            run()
        best = min(best, (perf_counter() - began) / count)
    return best * 1e6


def chains() -> tuple[list[str], list[str]]:
    """The table of the cost of chains, and the budgets that were missed."""
    rows = ["| prompt | " + " | ".join(SIZES) + " |", "|---|" + "---|" * len(SIZES)]
    missed = []
    for kind, make in (("chat", chat), ("completions", completion), ("token ids", ids)):
        cells = []
        for name, size in SIZES.items():
            body = make(size)
            found = chain_of(body, KEY)
            took = least(lambda body=body: chain_of(body, KEY))  # type: ignore[misc]
            cells.append(f"{took:.0f} µs, {len(found.hashes)} blocks")
            if took > BUDGETS.get(name, took):
                missed.append(f"a chain of {kind}, {name}: {took:.0f} µs")
        rows.append(f"| {kind} | " + " | ".join(cells) + " |")
    return rows, missed


def filled(engines: int, chain: Chain) -> PrefixIndex:
    """An index in which all engines have the start of a prompt, and each has a different length of it."""
    index = PrefixIndex()
    for number in range(engines):
        url = f"http://10.0.{number // 256}.{number % 256}:8000"
        index.join(url, 1_000_000)
        part = chain.hashes[: 1 + number % len(chain.hashes)]
        index.entered_elsewhere(url, msgspec.structs.replace(chain, hashes=part))
    return index


def lookups() -> tuple[list[str], list[str]]:
    """The table of the cost of a look-up, an entry and its correction."""
    rows = [
        "| engines | look, 4 kB | look, 400 kB | look, 4 MB | enter and correct, 4 kB | the same, 400 kB |",
        "|---|---|---|---|---|---|",
    ]
    short, long, longest = (chain_of(chat(SIZES[name]), KEY) for name in ("4 kB", "400 kB", "4 MB"))
    missed = []
    for engines in ENGINES:
        cells = []
        for chain in (short, long, longest):
            index = filled(engines, chain)
            cells.append(least(lambda index=index, chain=chain: index.cached(chain)))  # type: ignore[misc]
        if engines == 16 and cells[0] > LOOKUP_BUDGET:
            missed.append(f"a look for 16 engines: {cells[0]:.0f} µs")
        for chain in (short, long):
            index = filled(engines, chain)
            url = next(iter(index.engines))

            def enter(index: PrefixIndex = index, url: str = url, chain: Chain = chain) -> None:
                index.enter(url, chain)
                index.correct(url, chain, chain.tokens, chain.tokens)

            cells.append(least(enter))
        rows.append(f"| {engines} | " + " | ".join(f"{cell:.1f} µs" for cell in cells) + " |")
    return rows, missed


def memory(prompt: int, engines: int = 64, tokens: int = 1_000_000) -> str:
    """A row of the table of memory: caches full of prompts of one length, each prompt in one engine only."""
    chosen = random.Random(prompt)
    model = chain_of(completion(prompt), KEY)
    tracemalloc.start()
    began = tracemalloc.get_traced_memory()[0]
    index = PrefixIndex()
    urls = [f"http://engine-{number}" for number in range(engines)]
    for url in urls:
        index.join(url, tokens)
    while sum(index.tokens(url) for url in urls) < 0.98 * engines * tokens and not index.figures(0).evictions:
        for url in urls:
            hashes = tuple(chosen.getrandbits(64) - (1 << 63) for _ in model.hashes)
            index.entered_elsewhere(url, msgspec.structs.replace(model, hashes=hashes))
    used = tracemalloc.get_traced_memory()[0] - began
    tracemalloc.stop()
    figures = index.figures(0)
    return (
        f"| {prompt / 1000:g} kB | {figures.entries:,} | {used / 1e6:.0f} MB | {used / figures.entries:.0f} | "
        f"{figures.bytes / 1e6:.0f} MB |"
    )


def sharing() -> list[str]:
    """The cost of two workers' rings for each request."""
    rings = PrefixRings(2)
    index, other = PrefixIndex(), PrefixIndex()
    for one in (index, other):
        one.join("http://engine", 1_000_000)
    PeerPrefixes(rings, 0, index)
    reader = PeerPrefixes(rings, 1, other)
    rows = ["| prompt | write | look and enter | look with nothing new |", "|---|---|---|---|"]
    for name in ("4 kB", "400 kB"):
        chain = chain_of(chat(SIZES[name]), KEY)
        assert index.journal is not None
        journal = index.journal
        write = least(lambda journal=journal, chain=chain: journal.entered("http://engine", chain))  # type: ignore[misc]
        reader.read()

        def both(journal: Journal = journal, chain: Chain = chain) -> None:
            journal.entered("http://engine", chain)
            reader.read()

        rows.append(f"| {name} | {write:.1f} µs | {least(both) - write:.1f} µs | {least(reader.read):.1f} µs |")
    return rows


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("bench.prefix", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="end with 1 when a budget is missed")
    parser.add_argument("--quick", action="store_true", help="without memory")
    chosen = parser.parse_args(arguments)
    rows, missed = chains()
    print("A prompt's chain:\n", *rows, sep="\n")
    rows, more = lookups()
    print("\nA look for all engines (of which each has another part of the prompt), and an entry:\n", *rows, sep="\n")
    print("\nTwo workers' rings, for each request:\n", *sharing(), sep="\n")
    if not chosen.quick:
        print("\nMemory of 64 engines of 1,000,000 tokens, full of prompts that no two engines share:\n")
        print("| each prompt | entries | memory | bytes an entry | as the metric says |\n|---|---|---|---|---|")
        for prompt in (1_000, 16_000, 128_000):
            print(memory(prompt), flush=True)
    for line in (missed := missed + more):
        print(f"over budget: {line}", file=sys.stderr)
    return 1 if missed and chosen.check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
