"""A cache of KV blocks that all engines share, as a folder: ExampleConnector, LMCache and similar connectors.

Blocks are found by the hash of all tokens up to their end, and only whole blocks are stored. Requests have no
parameters for it: an engine's role decides whether it stores the blocks that it has computed, and whether it loads
blocks that it lacks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from pd_proxy.decoding import msgpack_decoder

from pd_proxy_simulator.blocks import Content
from pd_proxy_simulator.connectors.engine import ConnectorEngine
from pd_proxy_simulator.connectors.side import Side
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.transfers import Transfer

_encode = msgspec.msgpack.Encoder().encode
_decode = msgpack_decoder(tuple[int, tuple[int, ...], int])


class SharedCache(Side):
    """Finds blocks by their content; a missing block is computed."""

    recomputes = True

    def __init__(self, engine: ConnectorEngine) -> None:
        super().__init__(engine)
        config = engine.config
        # Blocks that were computed with another model or another block size are never hit.
        self._folder = Path(config.shared_path) / f"{config.model}-{config.weights}-{config.block_size}"
        self._folder.mkdir(parents=True, exist_ok=True)

    def transfer(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Transfer:
        role = self.engine.config.role
        return Transfer(role) if role == "prefill" or role == "decode" else Transfer()

    def computed(self, sequence: Sequence) -> None:
        if self.engine.config.role == "decode":
            return
        for index in range(sequence.prompt_length // self.engine.config.block_size):
            path = self._path(sequence, index)
            if not path.exists():
                content = self.engine.pool.read(sequence.blocks[index].index, scrambled_when_free=False)
                half = path.with_suffix(f".{os.getpid()}-{self.engine.id}")
                half.write_bytes(_encode(content))
                half.rename(path)  # atomic: the file is whole, or does not exist

    def load(self, sequence: Sequence) -> None:
        self.engine.fetch(sequence, self._find(sequence))

    async def _find(self, sequence: Sequence) -> list[Content]:
        """The stored blocks that follow those of this engine's own cache, up to the first gap. The last token is
        always computed here."""
        size = self.engine.config.block_size
        found: list[Content] = []
        for index in range(sequence.cached // size, (sequence.prompt_length - 1) // size):
            try:
                before, tokens, error = _decode(self._path(sequence, index).read_bytes())
            except FileNotFoundError:
                break
            found.append((before, list(tokens), error))
        return found

    def _path(self, sequence: Sequence, index: int) -> Path:
        return self._folder / f"{(sequence.boundaries[index + 1] ^ sequence.cache_key):x}"
