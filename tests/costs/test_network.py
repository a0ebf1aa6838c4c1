"""Pulls between instances: every byte once, the tightest link, and contention."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.catalogue import model_spec
from distserve.cluster import Cluster
from distserve.costs.memory import kv_heads_per_rank, stage_layers
from distserve.costs.network import Links, shares
from distserve.costs.seats import Seats

OPT, LLAMA = model_spec("facebook/opt-66b"), model_spec("meta-llama/Llama-3.1-70B")
CLUSTER = Cluster("a100-80g", 4, 8, 300e9, 3e9, 1e-5, 1e-4)
LINKS = Links(CLUSTER, efficiency=1.0)


def on(node: int, first: int, tp: int = 1, pp: int = 1) -> Seats:
    return Seats(tuple(f"node{node}:{first + rank}" for rank in range(tp * pp)), tp, pp)


def test_equal_instances_in_a_node_read_rank_by_rank() -> None:
    found = LINKS.route(OPT, on(0, 0, 2, 2), on(0, 4, 2, 2))
    expected = {("send", f"node0:{rank}"): 0.25 for rank in range(4)}
    expected |= {("receive", f"node0:{rank}"): 0.25 for rank in range(4, 8)}
    assert dict(found.loads) == expected
    assert found.latency == 1e-5
    assert LINKS.seconds(found, 12e9) == pytest.approx(1e-5 + 3e9 / 300e9)


def test_one_rank_gathers_from_four() -> None:
    found = LINKS.route(OPT, on(0, 0, 4), on(0, 4))
    assert dict(found.loads)["receive", "node0:4"] == pytest.approx(1.0)
    assert LINKS.seconds(found, 3e9) == pytest.approx(1e-5 + 0.01)


def test_between_nodes_all_ranks_share_the_network() -> None:
    found = LINKS.route(OPT, on(0, 0, 4), on(1, 0, 2, 2))
    assert {link: pytest.approx(share) for link, share in found.loads} == {("out", "node0"): 1.0, ("in", "node1"): 1.0}
    assert found.latency == 1e-4
    assert LINKS.rates([found]) == [pytest.approx(3e9)]


def test_an_instance_over_two_nodes_uses_both() -> None:
    wide = Seats(("node0:0", "node1:0"), 1, 2)
    found = LINKS.route(OPT, wide, Seats(("node0:1", "node1:1"), 1, 2))
    assert {link[0] for link, _ in found.loads} == {"send", "receive"}  # same-stage segments in one node: paper, Alg. 2
    crossed = LINKS.route(OPT, wide, Seats(("node1:1", "node0:1"), 1, 2))
    assert dict(crossed.loads) == {(way, f"node{node}"): 0.5 for way in ("in", "out") for node in (0, 1)}


def test_on_one_device_nothing_moves() -> None:
    found = LINKS.route(OPT, on(0, 0), on(0, 0))
    assert (found.loads, found.latency) == ((), 0.0)
    assert LINKS.rates([found]) == [math.inf]
    assert LINKS.seconds(found, 1e9) == 0.0


def test_pulls_share_their_tightest_link() -> None:
    one, two = LINKS.route(OPT, on(0, 0), on(1, 0)), LINKS.route(OPT, on(0, 1), on(2, 0))
    inside = LINKS.route(OPT, on(0, 2), on(0, 3))
    assert LINKS.rates([one, two, inside]) == [pytest.approx(1.5e9), pytest.approx(1.5e9), pytest.approx(300e9)]
    assert LINKS.rates([one, one, one]) == [pytest.approx(1e9)] * 3
    assert LINKS.rate(one, Counter({("out", "node0"): 2, ("in", "node1"): 5})) == pytest.approx(0.6e9)


def test_links_reach_a_share_of_their_nominal_bandwidth() -> None:
    assert Links(CLUSTER).capacity(("send", "node0:0")) == pytest.approx(0.85 * 300e9)
    assert Links(CLUSTER).capacity(("in", "node0")) == pytest.approx(0.85 * 3e9)


def test_replicated_heads_are_read_from_different_copies() -> None:
    found = list(shares(LLAMA, on(0, 0, 16), on(2, 0, 16)))
    assert len({source for source, _, _ in found}) == 16
    assert sum(pieces for _, _, pieces in found) == 2 * 80 * 8  # each head is wanted on two ranks


@given(
    spec=st.sampled_from([OPT, LLAMA]),
    degrees=st.tuples(*[st.sampled_from([1, 2, 4, 8]), st.integers(1, 9)] * 2),
)
def test_each_rank_gets_exactly_what_it_holds(spec: object, degrees: tuple[int, int, int, int]) -> None:
    spec = spec if isinstance(spec, type(OPT)) else OPT
    tp, pp, to_tp, to_pp = degrees
    source, target = (Seats(tuple(map(str, range(t * p))), t, p) for t, p in ((tp, pp), (to_tp, to_pp)))
    got: Counter[int] = Counter()
    sent: Counter[int] = Counter()
    for sender, receiver, pieces in shares(spec, source, target):
        assert pieces > 0
        got[receiver] += pieces
        sent[sender] += pieces
    for rank in range(to_tp * to_pp):
        assert got[rank] == kv_heads_per_rank(spec, to_tp) * stage_layers(spec, to_pp)[rank // to_tp]
    for rank in range(tp * pp):
        assert sent[rank] * tp == spec.num_kv_heads * stage_layers(spec, pp)[rank // tp]
