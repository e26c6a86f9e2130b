"""Prompts without text: their shared beginnings, their tokens and their bytes.

A prompt is a row of parts. A part is the beginning of an endless text, its *stem*. Two prompts that begin with the same
stems share the part of these texts that both have. Hashes of blocks follow from the stems before a block and from its
place, so no text is ever made: a chain of blocks is a few ranges of integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain as joined
from typing import NamedTuple

from pd_proxy.prefix.blocks import TEXT
from pd_proxy.prefix.chain import Chain

from bench.fleet.blocks import BLOCK

ESTIMATE = 4
"""Bytes that the gateway assumes for a token before it has learnt better."""
_MASK = (1 << 62) - 1


class Part(NamedTuple):
    """The first `tokens` tokens of an endless text.

    Attributes:
        ratio: bytes of one token; the gateway does not know it.
    """

    stem: int
    tokens: int
    ratio: float = 4.0


class Prompt:
    """A prompt as engines and the gateway see it.

    Attributes:
        tokens: the number of tokens that an engine makes of it.
        size: bytes of its text.
        blocks: hashes of its whole blocks, as engines chain them.
        chain: hashes of its blocks of bytes, as the gateway chains them (`proxy/pd_proxy/prefix/chain.py`).
        estimate: the gateway's estimate of its tokens.
    """

    __slots__ = ("blocks", "chain", "estimate", "size", "tokens")

    def __init__(self, parts: Sequence[Part], key: str = "") -> None:
        """Arguments: key: the model or adapter, whose prompts share nothing with another's."""
        path = hash((key, 1)) & _MASK
        tokens, size = 0, 0.0
        blocks: list[range] = []
        said: list[range] = []
        for part in parts:
            path = _mixed(path, part.stem, tokens)
            end, last = tokens + part.tokens, size + part.tokens * part.ratio
            blocks.append(range(path + tokens // BLOCK, path + end // BLOCK))
            said.append(range(path + TEXT.whole(int(size)), path + TEXT.whole(int(last))))
            tokens, size = end, last
        self.tokens = tokens
        self.size = int(size)
        self.blocks = tuple(joined.from_iterable(blocks))
        self.estimate = max(1, self.size // ESTIMATE)
        self.chain = Chain(
            hashes=tuple(joined.from_iterable(said)), tokens=self.estimate, units=self.size, scale=1 / ESTIMATE
        )


def _mixed(path: int, stem: int, offset: int) -> int:
    """A number for a part's stem and everything before it; spread over 62 bits, so that ranges do not overlap."""
    value = (path ^ (stem * 0x9E3779B97F4A7C15) ^ (offset * 0xC2B2AE3D27D4EB4F)) & ((1 << 64) - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return (value ^ (value >> 31)) & _MASK
