"""Which KV blocks are free: ids and counts. Knows no tensor, and not who owns a block that is taken."""

from __future__ import annotations

from typing import Protocol

from distserve.errors import RequestError
from distserve.sched.base import Sequence


class Generations(Protocol):
    """One number per block: a list, or shared memory (`memoryview.cast("Q")`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, block: int, /) -> int: ...

    def __setitem__(self, block: int, generation: int, /) -> None: ...


class BlockPool:
    """The blocks of one instance. A block is free, or it is owned by whoever got it from `allocate`.

    free --allocate--> owned --free--> free, and its generation goes up by one

    A block's generation tells a remote reader that the block it was promised is no longer that block. `generations` may
    be memory that such a reader sees too (8-byte integers, this process the only writer): a block's generation then
    moves before the block can be handed out again.

    Reuse is last-in first-out: the blocks freed last are the ones most likely still in a cache, and a lightly loaded
    pool keeps to a small part of its memory.
    """

    __slots__ = ("_free", "_owned", "block_size", "capacity", "generations", "num_blocks")

    def __init__(self, num_blocks: int, block_size: int, generations: Generations | None = None) -> None:
        assert num_blocks >= 1, f"num_blocks must be at least 1, not {num_blocks}"
        assert block_size >= 1, f"block_size must be at least 1, not {block_size}"
        self.num_blocks = num_blocks
        self.block_size = block_size  # tokens
        self.capacity = num_blocks * block_size  # tokens of all blocks together
        self.generations: Generations = [0] * num_blocks if generations is None else generations
        assert len(self.generations) >= num_blocks, f"{len(self.generations)} generations for {num_blocks} blocks"
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the first allocation gets 0, 1, 2, ...
        self._owned = bytearray(num_blocks)  # 1: handed out; finds a block that is freed twice

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold the KV of `num_tokens` tokens."""
        return (num_tokens + self.block_size - 1) // self.block_size

    def check_fits(self, num_tokens: int) -> None:
        """Raises `RequestError` where `num_tokens` tokens would not fit even if every block were free."""
        if num_tokens > self.capacity:
            raise RequestError(
                f"this request needs the KV cache of {num_tokens} tokens, but all KV memory of the instance holds "
                f"{self.capacity}: shorten the prompt, or serve with more KV memory",
                param="prompt",
                code="context_length_exceeded",
            )

    def allocate(self, n: int) -> list[int]:
        """Hands out `n` blocks. The caller has made sure that there are as many (`num_free`)."""
        assert 0 <= n <= len(self._free), f"{n} blocks wanted, {len(self._free)} free: check num_free first"
        if n == 0:
            return []
        blocks = self._free[-n:]
        del self._free[-n:]
        blocks.reverse()
        owned = self._owned
        for block in blocks:
            owned[block] = 1
        return blocks

    def give(self, sequence: Sequence, n: int) -> None:
        """Hands out `n` blocks more to a sequence."""
        blocks = self.allocate(n)
        if sequence.num_blocks:
            sequence.blocks += blocks
        else:
            sequence.blocks = blocks
        sequence.num_blocks += n

    def take_back(self, sequence: Sequence) -> None:
        """All that it has."""
        self.free(sequence.blocks)
        sequence.num_blocks = 0

    def free(self, blocks: list[int]) -> None:
        """Takes blocks back and empties the list, so that its owner cannot use them by mistake."""
        owned, generations = self._owned, self.generations
        for block in blocks:
            assert owned[block], f"block {block} is freed, but it is free already: two owners believed it theirs"
            owned[block] = 0
            generations[block] += 1
        blocks.reverse()
        self._free += blocks
        blocks.clear()


class BlockCount(BlockPool):
    """Blocks without ids, for a world that has no memory: only how many are free, and how many a sequence has, is
    true."""

    __slots__ = ("_num_free",)

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(1, block_size)  # there is nothing to keep for each of them
        self.num_blocks = self._num_free = num_blocks
        self.capacity = num_blocks * block_size

    @property
    def num_free(self) -> int:
        return self._num_free

    def allocate(self, n: int) -> list[int]:
        assert 0 <= n <= self._num_free, f"{n} blocks wanted, {self._num_free} free: check num_free first"
        self._num_free -= n
        return [0] * n

    def give(self, sequence: Sequence, n: int) -> None:
        assert 0 <= n <= self._num_free, f"{n} blocks wanted, {self._num_free} free: check num_free first"
        self._num_free -= n
        sequence.num_blocks += n

    def take_back(self, sequence: Sequence) -> None:
        self._num_free += sequence.num_blocks
        assert self._num_free <= self.num_blocks, "more blocks are freed than there are"
        sequence.num_blocks = 0

    def free(self, blocks: list[int]) -> None:
        self._num_free += len(blocks)
        assert self._num_free <= self.num_blocks, "more blocks are freed than there are"
        blocks.clear()
