"""The KV of several ranks as one: digests that do not know of ranks, copies of heads that are each complete."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.transfer.support import cut, shardings, whole_kv

from distserve.specs import KVLayout
from distserve.transfer.blocks import RankBlocks
from distserve.transfer.layout import InstanceLayout

NUM_BLOCKS = 4


def holding(whole: NDArray[np.uint8], layout: InstanceLayout) -> RankBlocks:
    """An instance whose ranks hold their parts of `whole`."""
    return RankBlocks([memoryview(bytearray(part.tobytes())) for part in cut(whole, layout)], len(whole), layout)


def empty(layout: InstanceLayout) -> RankBlocks:
    sizes = [NUM_BLOCKS * layout.of_rank(rank).block_bytes for rank in range(layout.sharding.num_ranks)]
    return RankBlocks([memoryview(bytearray(size)) for size in sizes], NUM_BLOCKS, layout)


@settings(max_examples=60)
@given(st.data())
def test_any_sharding_has_the_same_digests_and_copies_to_any_other(data: st.DataObject) -> None:
    model = KVLayout(data.draw(st.integers(1, 6)), data.draw(st.sampled_from([1, 2, 3, 4, 6])), 2, 3, "float16")
    source, target = (
        InstanceLayout(data.draw(shardings(model.num_layers, model.num_kv_heads)), 2, 3, "float16") for _ in range(2)
    )
    whole = whole_kv(model, NUM_BLOCKS)
    there, here = holding(whole, source), empty(target)
    expected = holding(whole, InstanceLayout.of(model)).digests([2, 0, 3])
    assert there.every_digest([2, 0, 3]) == [expected] * source.sharding.copies
    found = here.copy_from(there, [2, 0, 3], [1, 3, 0])
    assert found == here.every_digest([1, 3, 0]) == [expected] * target.sharding.copies
    for memory, part in zip(here.ranks, cut(whole, target), strict=True):
        assert (memory[[1, 3, 0]] == part[[2, 0, 3]]).all()
        assert not memory[2].any()


@pytest.mark.parametrize("rank", range(6))
def test_each_copy_of_a_head_is_looked_at(rank: int) -> None:
    """3 copies of 2 heads: damage on a rank is in the digest of its copy, and in no other."""
    model = KVLayout(2, 2, 4, 4, "float16")
    blocks = holding(whole_kv(model, NUM_BLOCKS), InstanceLayout.of(model, tp=6))
    before = blocks.every_digest([0, 1])
    blocks.ranks[rank][1, 9] ^= 1
    after = blocks.every_digest([0, 1])
    assert [one == other for one, other in zip(before, after, strict=True)] == [copy != rank % 3 for copy in range(3)]
    assert all(one[0] == other[0] for one, other in zip(before, after, strict=True))
