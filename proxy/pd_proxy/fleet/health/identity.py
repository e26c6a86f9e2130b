"""The identity of an engine: what it reports about itself that a hand-off depends on.

A hand-off that does not fit the engine that reads it kills that engine. So an identity is used only while it is
certain, which is as long as a sentinel connection is open (`sentinel.py`). One that is not known is `None`.
"""

from __future__ import annotations

import re

import msgspec

from pd_proxy.decoding import Undecodable, json_decoder

_CONFIG = b"vllm:cache_config_info{"
_BLOCK_SIZE = re.compile(rb'[{,]block_size="(\d{1,6})"')


class EngineIdentity(msgspec.Struct, frozen=True, eq=False):
    """The identity of one engine process.

    Two identities are equal only if they are one object: one that was read again may be of another process, even if all
    values are equal.

    Attributes:
        block_size: tokens in a block of its KV cache.
        version: as the engine reports it.
        context: tokens that a prompt and its answer may have together.
    """

    block_size: int
    version: str
    context: int

    def fits(self, other: EngineIdentity) -> bool:
        """Whether a hand-off that was made for the other engine can be read by this one."""
        return self.block_size == other.block_size and self.version == other.version and self.context >= other.context


class _Card(msgspec.Struct):
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Card]


class _Version(msgspec.Struct):
    version: str


_read_models = json_decoder(_Models)
_read_version = json_decoder(_Version)


def read_identity(metrics: bytes, models: bytes, version: bytes) -> EngineIdentity | None:
    """The identity on an engine's pages; None if they lack a part of it."""
    block_size = read_block_size(metrics)
    try:
        cards, named = _read_models(models).data, _read_version(version).version
    except Undecodable:
        return None
    context = min((card.max_model_len for card in cards if card.max_model_len), default=0)  # adapters have none
    return EngineIdentity(block_size, named, context) if block_size and context > 0 and named else None


def read_block_size(page: bytes) -> int:
    """The block size on a page of /metrics; 0 if the page has none, or if the engines behind it differ.

    A data-parallel server has a line for each of its engines, and any of them may get a request.
    """
    sizes = set()
    start = page.find(_CONFIG)
    while start >= 0:
        end = page.find(b"\n", start)
        found = _BLOCK_SIZE.search(page[start : end if end >= 0 else len(page)])
        sizes.add(int(found[1]) if found else 0)
        start = page.find(_CONFIG, start + 1)
    return sizes.pop() if len(sizes) == 1 else 0
