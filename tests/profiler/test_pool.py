"""KV of the right kind, without computing it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.profiler.pool import Pool

SIZES = (3, 5)  # bytes of a block, of each of two ranks


def memories(num_blocks: int) -> list[bytearray]:
    return [bytearray(num_blocks * size) for size in SIZES]


@given(st.integers(1, 30), st.data())
def test_blocks_hold_the_pattern_over_and_over(num_blocks: int, data: st.DataObject) -> None:
    real = data.draw(st.integers(1, num_blocks))
    found, loaded = memories(num_blocks), list[int]()
    pool = Pool([memoryview(memory) for memory in found], SIZES, num_blocks, loaded.extend)
    for memory, size in zip(found, SIZES, strict=True):
        for block in range(real):  # its number and one: 0 is what nobody wrote
            memory[block * size : (block + 1) * size] = bytes([block + 1]) * size
    pool.learn(real)
    filled = real
    for count in data.draw(st.lists(st.integers(0, num_blocks), max_size=5)):
        pool.fill(count)
        filled = max(filled, count)
        for memory, size in zip(found, SIZES, strict=True):
            held = [memory[block * size : (block + 1) * size] for block in range(num_blocks)]
            assert all(set(each) == {held[block][0]} for block, each in enumerate(held))
        assert loaded == list(range(real, filled)), "each block is taken over once"
    size = SIZES[0]
    firsts = [found[0][block * size] for block in range(num_blocks)]
    assert all(1 <= first <= real for first in firsts[:filled])
    assert firsts[:real] == list(range(1, real + 1))
    assert firsts[filled:] == [0] * (num_blocks - filled)


def test_without_a_prompt_nothing_is_copied() -> None:
    found, loaded = memories(4), list[int]()
    pool = Pool([memoryview(memory) for memory in found], SIZES, 4, loaded.extend)
    pool.fill(4)
    assert not loaded
    assert not any(map(any, found))


def test_every_rank_has_a_block_size() -> None:
    with pytest.raises(ValueError, match="zip"):
        Pool([memoryview(bytearray(3))], SIZES, 1, lambda blocks: None)
