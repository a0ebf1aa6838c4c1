import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.errors import RequestError
from distserve.sched.blocks import BlockPool


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
