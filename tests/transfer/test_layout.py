"""Which bytes of which rank: every byte once and in its place, by moving real ones and comparing with the whole."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.transfer.support import cut, shardings, whole_kv

from distserve.errors import PlanError
from distserve.sharding import heads_fit
from distserve.specs import KVLayout
from distserve.transfer.copying import Bytes
from distserve.transfer.layout import InstanceLayout, Range, reads

DEGREES = range(1, 5)
PAIRS = list(product(DEGREES, DEGREES))
# layers, KV heads: every tp up to 4 fits some of them, 5 and 7 layers make stages uneven, 1 and 2 heads are replicated
SHAPES = [(5, 1), (7, 2), (4, 3), (6, 4), (5, 12)]


def move(source: InstanceLayout, target: InstanceLayout, memory: list[Bytes]) -> list[Bytes]:
    """Each target rank's memory after a pull: blocks 0, 1, ... of the source land in the target's in reverse."""
    pulled = []
    for rank, found in enumerate(reads(source, target)):
        size = target.of_rank(rank).block_bytes
        own, written = np.zeros((len(memory[0]), size), np.uint8), np.zeros(size, int)
        for read in found:
            for at, to, length in read.ranges:
                assert 0 <= at < at + length <= memory[read.source].shape[1]
                assert 0 <= to < to + length <= size
                own[::-1, to : to + length] = memory[read.source][:, at : at + length]
                written[to : to + length] += 1
        assert (written == 1).all(), f"rank {rank} of {target} from {source}"
        pulled.append(own[::-1])
    return pulled


def check(source: InstanceLayout, target: InstanceLayout, model: KVLayout) -> None:
    whole = whole_kv(model, 2)
    expected = cut(whole, target)
    for rank, (found, wanted) in enumerate(zip(move(source, target, cut(whole, source)), expected, strict=True)):
        assert (found == wanted).all(), f"rank {rank} of {target} from {source}"
    for found_reads in reads(source, target):
        for read in found_reads:
            assert read.size == sum(length for _, _, length in read.ranges)
            for one, two in pairwise(read.ranges):
                assert one.source + one.size <= two.source
                assert one.target + one.size <= two.target
                joined = one.source + one.size == two.source and one.target + one.size == two.target
                assert not joined, "two ranges that could be one"
        assert len({read.source for read in found_reads}) == len(found_reads)


def of(shape: tuple[int, int], tp: int, pp: int, block_size: int = 2) -> tuple[KVLayout, InstanceLayout]:
    model = KVLayout(*shape, 2, block_size, "float16")
    return model, InstanceLayout.of(model, tp, pp)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_small_degrees(shape: tuple[int, int]) -> None:
    """Any (tp, pp) up to (4, 4) that the heads allow, to any: the KV that arrives is the KV that was computed."""
    layouts = [of(shape, tp, pp)[1] for tp, pp in PAIRS if heads_fit(shape[1], tp)]
    model = of(shape, 1, 1)[0]
    for source, target in product(layouts, layouts):
        check(source, target, model)


@settings(max_examples=150)
@given(st.data())
def test_any_stages_heads_and_blocks(data: st.DataObject) -> None:
    layers, heads = data.draw(st.integers(1, 10)), data.draw(st.integers(1, 12))
    head_dim, block_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from(["bfloat16", "float16", "float32"]))
    source, target = (
        InstanceLayout(data.draw(shardings(layers, heads)), head_dim, block_size, dtype) for _ in range(2)
    )
    check(source, target, KVLayout(layers, heads, head_dim, block_size, dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_layouts_copy_whole_blocks_rank_by_rank(shape: tuple[int, int]) -> None:
    for layout in (of(shape, tp, pp)[1] for tp, pp in PAIRS if heads_fit(shape[1], tp)):
        for rank, found in enumerate(reads(layout, layout)):
            whole_block = Range(0, 0, layout.of_rank(rank).block_bytes)
            assert [(read.source, read.ranges) for read in found] == [(rank, (whole_block,))]


def test_ranges_done_by_hand() -> None:
    """2 layers, 4 heads of 8 bytes a token, 2 tokens a block: a head's keys of a layer are 16 bytes."""
    model = KVLayout(2, 4, 2, 2, "float32")
    one, halves, stages = (InstanceLayout.of(model, tp, pp) for tp, pp in ((1, 1), (2, 1), (1, 2)))
    # the second half of the heads: of each layer, 32 bytes of keys and 32 of values, from a block of 256
    assert reads(one, halves)[1][0].ranges == (
        Range(32, 0, 32),
        Range(96, 32, 32),
        Range(160, 64, 32),
        Range(224, 96, 32),
    )
    # the second layer lies together, and after the first
    assert [read.ranges for read in reads(one, stages)[1]] == [(Range(128, 0, 128),)]
    assert [(read.source, read.ranges) for read in reads(stages, one)[0]] == [
        (0, (Range(0, 0, 128),)),
        (1, (Range(0, 128, 128),)),
    ]


def test_places_done_by_hand() -> None:
    """2 layers, 4 heads: keys of layer 0 are units 0 to 3, its values 4 to 7, keys of layer 1 are 8 to 11."""
    model = KVLayout(2, 4, 2, 2, "float32")
    assert InstanceLayout.of(model).places(0) == list(range(16))
    assert InstanceLayout.of(model, tp=2).places(1) == [2, 3, 6, 7, 10, 11, 14, 15]
    assert InstanceLayout.of(model, tp=8, pp=2).places(11) == [9, 13]
    assert InstanceLayout.of(model).unit_bytes == 16


@pytest.mark.parametrize(
    ("source", "target"),
    [((4, 1), (4, 1)), ((8, 1), (2, 1)), ((4, 1), (8, 1)), ((8, 1), (2, 4)), ((4, 2), (2, 4)), ((6, 1), (12, 3))],
)
def test_readers_are_spread_over_the_copies_of_a_head(source: tuple[int, int], target: tuple[int, int]) -> None:
    """2 heads: no copy serves two readers more than another that holds the same layers."""
    (_, there), (_, here) = of((8, 2), *source), of((8, 2), *target)
    readers = [0] * there.sharding.num_ranks
    for found in reads(there, here):
        for read in found:
            readers[read.source] += 1
    for stage in range(there.sharding.pp):
        for head in range(2):
            first = stage * there.sharding.tp + head * there.sharding.copies
            turns = readers[first : first + there.sharding.copies]
            assert max(turns) - min(turns) <= 1, readers


def test_a_pair_is_computed_once() -> None:
    (_, source), (_, again), (_, target) = of((6, 4), 2, 3), of((6, 4), 2, 3), of((6, 4), 4, 1)
    assert source is not again
    assert reads(source, target) is reads(again, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 32}, "block_size 16 and 32: give both the same"),
        ({"dtype": "float32"}, "dtype float16 and float32"),
        ({"num_layers": 5}, "layers 4 and 5"),
        ({"num_kv_heads": 4, "head_dim": 16}, "KV heads 2 and 4, head_dim 8 and 16"),
    ],
)
def test_what_does_not_match_is_refused(change: dict[str, int], message: str) -> None:
    values = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 8, "block_size": 16, "dtype": "float16"}
    source, target = (InstanceLayout.of(KVLayout(**(values | more))) for more in ({}, change))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=message):
        reads(source, target)


def test_degrees_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PlanError, match="tp = 3 does not fit 4 KV heads: take a divisor or a multiple of 4"):
        of((4, 4), 3, 1)
    with pytest.raises(PlanError, match="pp = 5 stages for a model of 4 layers: take 1 to 4"):
        of((4, 4), 1, 5)
