import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.errors import RequestError
from distserve.sched.base import Sequence
from distserve.sched.blocks import BlockCount, BlockPool


def test_hands_out_consecutive_blocks_at_first() -> None:
    pool = BlockPool(8, 16)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(0) == []
    assert pool.allocate(5) == [3, 4, 5, 6, 7]
    assert pool.num_free == 0


def test_reuses_the_blocks_freed_last_in_their_order() -> None:
    pool = BlockPool(8, 16)
    first, second = pool.allocate(3), pool.allocate(3)
    pool.free(first)
    pool.free(second)
    assert pool.allocate(3) == [3, 4, 5]
    assert pool.allocate(3) == [0, 1, 2]


def test_freeing_empties_the_owners_list_and_moves_each_generation_once() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.allocate(2)
    assert [pool.generations[block] for block in range(4)] == [0, 0, 0, 0]
    pool.free(blocks)
    assert blocks == []
    assert [pool.generations[block] for block in range(4)] == [1, 1, 0, 0]


def test_generations_may_be_shared_memory() -> None:
    memory = bytearray(4 * 8)
    generations = memoryview(memory).cast("Q")
    pool = BlockPool(4, 16, generations)
    blocks = pool.allocate(1)
    pool.free(blocks)
    assert memory[0] == 1
    assert list(memoryview(memory).cast("Q")) == [1, 0, 0, 0]


def test_a_block_freed_twice_is_caught() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.allocate(2)
    copy = list(blocks)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="free already"):
        pool.free(copy)


def test_more_than_is_free_is_caught() -> None:
    pool = BlockPool(2, 16)
    with pytest.raises(AssertionError, match="3 blocks wanted, 2 free"):
        pool.allocate(3)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_blocks_for(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(4, 16).blocks_for(num_tokens) == num_blocks


def test_what_could_never_fit_is_refused_with_the_cure() -> None:
    pool = BlockPool(4, 16)
    pool.check_fits(64)
    with pytest.raises(
        RequestError, match=r"65 tokens.*holds 64: shorten the prompt, or serve with more KV memory"
    ) as e:
        pool.check_fits(65)
    assert e.value.param == "prompt"
    assert e.value.code == "context_length_exceeded"


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(0, 10)), max_size=60))
def test_blocks_are_neither_lost_nor_doubled(num_blocks: int, operations: list[tuple[bool, int]]) -> None:
    pool = BlockPool(num_blocks, 4)
    owned: list[list[int]] = []
    for allocate, n in operations:
        if allocate and n <= pool.num_free:
            owned.append(pool.allocate(n))
        elif owned:
            pool.free(owned.pop(n % len(owned)))
        taken = [block for blocks in owned for block in blocks]
        assert len(taken) == len(set(taken)) == num_blocks - pool.num_free


# -- to a sequence, and back ------------------------------------------------------------------------------------------


def test_a_sequence_keeps_what_it_has_and_gets_more_behind() -> None:
    pool, sequence = BlockPool(8, 16), Sequence(1, 100)
    pool.give(sequence, 2)
    pool.give(sequence, 0)
    pool.give(sequence, 3)
    assert sequence.blocks == [0, 1, 2, 3, 4]
    assert sequence.num_blocks == 5
    pool.take_back(sequence)
    assert (sequence.blocks, sequence.num_blocks, pool.num_free) == ([], 0, 8)
    assert [pool.generations[block] for block in range(8)] == [1] * 5 + [0] * 3
    pool.take_back(sequence)  # it has nothing
    assert pool.num_free == 8


def test_nobody_gets_a_list_that_is_another_ones() -> None:
    pool = BlockPool(8, 16)
    first, second = Sequence(1, 100), Sequence(2, 100)
    pool.give(first, 0)
    pool.give(second, 0)
    pool.give(first, 2)
    assert second.blocks == []
    blocks = first.blocks
    pool.take_back(first)
    assert blocks == [], "who still holds the list cannot use its blocks by mistake"
    pool.give(second, 2)
    assert blocks == []


@pytest.mark.parametrize("kind", [BlockPool, BlockCount])
def test_more_than_is_free_is_not_given(kind: type[BlockPool]) -> None:
    pool, sequence = kind(3, 16), Sequence(1, 100)
    pool.give(sequence, 2)
    with pytest.raises(AssertionError, match="2 blocks wanted, 1 free"):
        pool.give(sequence, 2)
    assert (sequence.num_blocks, pool.num_free) == (2, 1)


def test_counted_blocks_come_back_once() -> None:
    pool, sequence = BlockCount(3, 16), Sequence(1, 100)
    pool.give(sequence, 2)
    copy = Sequence(2, 100)
    copy.num_blocks = sequence.num_blocks
    pool.take_back(sequence)
    with pytest.raises(AssertionError, match="more blocks are freed than there are"):
        pool.take_back(copy)


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 4), st.none() | st.integers(0, 8)), max_size=80))
def test_counts_are_those_of_a_pool_with_ids(num_blocks: int, steps: list[tuple[int, int | None]]) -> None:
    """The simulator's blocks are the server's, only counted."""
    pool, count = BlockPool(num_blocks, 16), BlockCount(num_blocks, 16)
    theirs, counted = ([Sequence(id, 100) for id in range(5)] for _ in range(2))
    for id, n in steps:  # n None: all that it has comes back
        if n is None:
            pool.take_back(theirs[id])
            count.take_back(counted[id])
        elif n <= pool.num_free:
            pool.give(theirs[id], n)
            count.give(counted[id], n)
        assert count.num_free == pool.num_free
        assert count.capacity == pool.capacity
        assert [one.num_blocks for one in counted] == [len(one.blocks) for one in theirs]
        assert [one.num_blocks for one in theirs] == [len(one.blocks) for one in theirs]
        taken = [block for one in theirs for block in one.blocks]
        assert len(set(taken)) == len(taken) == num_blocks - pool.num_free
