"""Who holds which layers and heads: one answer for the loader, the simulator and a pull."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distserve.catalogue import model_spec
from distserve.costs.network import shares
from distserve.costs.seats import Seats
from distserve.engine.parallel import Member, Split, share
from distserve.errors import PlanError
from distserve.sharding import Sharding, heads_fit, parts, split_layers
from distserve.transfer.layout import InstanceLayout, reads


def test_uneven_stages_and_replicated_heads() -> None:
    assert split_layers(30, 7) == (5, 5, 4, 4, 4, 4, 4)
    sharding = Sharding(2, split_layers(7, 3), 4)
    assert (sharding.pp, sharding.num_ranks, sharding.num_layers, sharding.copies) == (3, 12, 7, 2)
    assert [sharding.layers(rank) for rank in (0, 3, 4, 11)] == [range(3), range(3), range(3, 5), range(5, 7)]
    assert [sharding.heads(rank) for rank in range(4, 8)] == [range(1), range(1), range(1, 2), range(1, 2)]


def test_what_cannot_be_shared_is_refused() -> None:
    for tp in (0, 3, 5, 6):
        with pytest.raises(PlanError, match=f"tp = {tp} does not fit 4 KV heads: take a divisor or a multiple of 4"):
            Sharding(4, (2, 2), tp)
    for stages in ((), (2, 0, 2)):
        with pytest.raises(PlanError, match="at least one; take a lower pp"):
            Sharding(4, stages)
    for pp in (0, 5):
        with pytest.raises(PlanError, match=f"pp = {pp} stages for a model of 4 layers: take 1 to 4"):
            split_layers(4, pp)


DEGREES = st.tuples(st.integers(1, 12), st.integers(1, 5))


@given(heads=st.integers(1, 8), layers=st.integers(5, 9), source=DEGREES, target=DEGREES)
def test_each_rank_reads_what_it_holds_from_ranks_that_hold_it(
    heads: int, layers: int, source: tuple[int, int], target: tuple[int, int]
) -> None:
    assume(heads_fit(heads, source[0]) and heads_fit(heads, target[0]))
    there, here = (Sharding(heads, split_layers(layers, pp), tp) for tp, pp in (source, target))
    found = Counter[tuple[int, int, int]]()
    for part in parts(there, here):
        assert set(part.layers) <= set(there.layers(part.source))
        assert set(part.heads) <= set(there.heads(part.source))
        found.update((part.target, layer, head) for layer in part.layers for head in part.heads)
    wanted = {
        (rank, layer, head)
        for rank in range(here.num_ranks)
        for layer in here.layers(rank)
        for head in here.heads(rank)
    }
    assert found == Counter(wanted)


@pytest.mark.parametrize(("heads", "tp"), [(8, 1), (8, 4), (8, 8), (2, 4), (1, 3), (3, 6)])
def test_the_loader_cuts_weights_where_a_pull_looks_for_their_kv(heads: int, tp: int) -> None:
    sharding = Sharding(heads, (1,), tp)
    for rank in range(tp):
        rows = share((heads * 16, 32), Split.KV_HEADS, heads, Member(rank, tp))[0]
        held = sharding.heads(rank)
        assert (rows.start, rows.stop) == (16 * held.start, 16 * held.stop)


@pytest.mark.parametrize("source", [(1, 1), (4, 2), (16, 3)])
@pytest.mark.parametrize("target", [(2, 7), (8, 1), (32, 2)])
def test_the_simulator_loads_links_with_the_bytes_that_a_pull_reads(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    spec = model_spec("meta-llama/Llama-3.1-70B")
    seats = [Seats(tuple(map(str, range(tp * pp))), tp, pp) for tp, pp in (source, target)]
    kv = spec.kv_layout(16, "bfloat16")
    head = kv.block_bytes // (spec.num_layers * spec.num_kv_heads)  # one head's keys and values of one layer
    simulated = Counter[tuple[int, int]]()
    for sender, receiver, pieces in shares(spec, *seats):
        simulated[sender, receiver] += head * pieces
    found = reads(*(InstanceLayout.of(kv, *degrees) for degrees in (source, target)))
    assert simulated == {(read.source, rank): read.size for rank, own in enumerate(found) for read in own}
