"""KV memory that holds KV of the right kind without anybody computing it. Knows bytes of blocks, no model and no
transport.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


class Pool:
    """The KV memory of every rank, as bytes: a prompt's KV is copied into the blocks that nobody computed."""

    def __init__(
        self,
        memories: Sequence[memoryview],
        block_bytes: Sequence[int],
        num_blocks: int,
        load: Callable[[list[int]], None],
    ) -> None:
        """`memories` and `block_bytes` of each rank; `load` takes blocks from there into the executor."""
        self._blocks = [
            np.frombuffer(memory, np.uint8, num_blocks * size).reshape(num_blocks, size)
            for memory, size in zip(memories, block_bytes, strict=True)
        ]
        self._load = load
        self._patterns = self._blocks
        self._length = 0  # blocks of a pattern
        self._filled = 0

    def learn(self, num_blocks: int) -> None:
        """Takes the first blocks, which hold a prompt's KV, for the pattern."""
        self._patterns = [blocks[:num_blocks].copy() for blocks in self._blocks]
        self._length = self._filled = num_blocks

    def fill(self, count: int) -> None:
        """The first `count` blocks hold KV from now on."""
        if not self._length or count <= self._filled:
            return
        for blocks, pattern in zip(self._blocks, self._patterns, strict=True):
            for first in range(self._filled, count, self._length):
                part = blocks[first : min(count, first + self._length)]
                part[:] = pattern[: len(part)]
        self._load(list(range(self._filled, count)))
        self._filled = count
