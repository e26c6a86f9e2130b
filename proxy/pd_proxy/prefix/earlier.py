"""The chains of stored responses, for requests that continue them."""

from __future__ import annotations

from collections import OrderedDict

from pd_proxy.prefix.chain import Chain

MOST_BLOCKS = 1 << 17
"""The bound of the blocks of all chains: some 10 MB, or a thousand conversations of 30,000 tokens."""

_OWN = 8  # blocks that take as much memory as a chain without its blocks


class EarlierChains:
    """The chains of responses by the ids of the responses. The least recently used are dropped.

    Arguments:
        most_blocks: the bound of the blocks of all chains.
    """

    def __init__(self, most_blocks: int = MOST_BLOCKS) -> None:
        self._most = most_blocks
        self._blocks = 0
        self._chains: OrderedDict[str, Chain] = OrderedDict()

    def keep(self, response: str, chain: Chain) -> None:
        """Keep the chain of the request that was answered with a response."""
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
        """The chain that belongs to a response; None where it is not known."""
        chain = self._chains.get(response)
        if chain is not None:
            self._chains.move_to_end(response)
        return chain
