"""The chains of stored responses, for the requests that go on from them."""

from __future__ import annotations

from collections import OrderedDict

from pd_proxy.prefix.chain import Chain

MOST_BLOCKS = 1 << 17
"""Of all chains that are kept: some 10 MB, or a thousand conversations of 30,000 tokens."""

_OWN = 8  # blocks that take as much as what a chain takes beside its blocks


class EarlierChains:
    """By the names of the responses; of those that nobody goes on from the oldest are forgotten.

    Arguments:
        most_blocks: bound of the blocks of all of them.
    """

    def __init__(self, most_blocks: int = MOST_BLOCKS) -> None:
        self._most = most_blocks
        self._blocks = 0
        self._chains: OrderedDict[str, Chain] = OrderedDict()

    def keep(self, response: str, chain: Chain) -> None:
        """Keep the chain of the request that a response answers."""
        old = self._chains.pop(response, None)
        if old is not None:
            self._blocks -= len(old.hashes) + _OWN
        if len(chain.hashes) + _OWN > self._most:
            return
        self._chains[response] = chain
        self._blocks += len(chain.hashes) + _OWN
        while self._blocks > self._most:
            _, oldest = self._chains.popitem(last=False)
            self._blocks -= len(oldest.hashes) + _OWN

    def find(self, response: str) -> Chain | None:
        """The chain to go on from; None where it is not known."""
        chain = self._chains.get(response)
        if chain is not None:
            self._chains.move_to_end(response)
        return chain
