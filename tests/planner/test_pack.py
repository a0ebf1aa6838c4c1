"""Seats: every device once, tensor-parallel groups inside a node, units in the nodes that they span."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.catalogue import model_spec
from distserve.cluster import Cluster, node_of
from distserve.plan import InstanceSpec, Plan, Role
from distserve.planner.candidates import Deployment, Shape, aligned, units
from distserve.planner.pack import pack

SHAPES = st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 4]))
NODES = st.lists(st.sampled_from([1, 2, 4, 6, 8]), min_size=1, max_size=5)


def cluster(sizes: list[int]) -> Cluster:
    return Cluster("a100-80g", len(sizes), tuple(sizes), 300e9, 3e9)


def seats_of(plan: Plan) -> list[str]:
    return [device for replica in plan.replicas() for device in replica.devices]


@given(NODES, st.lists(st.tuples(SHAPES, st.integers(1, 4)), min_size=1, max_size=3))
def test_no_device_twice_and_groups_in_one_node(sizes: list[int], groups: list[tuple[tuple[int, int], int]]) -> None:
    deployment = Deployment(tuple(InstanceSpec(Role.COLOCATED, tp, pp, count) for (tp, pp), count in groups))
    plan = pack(deployment, cluster(sizes))
    if deployment.num_devices > sum(sizes) or max(tp for (tp, _), _ in groups) > max(sizes):
        assert plan is None
        return
    if plan is None:
        return  # fragments: two groups of 3 leave two devices of 8 that nobody can use
    seats = seats_of(plan)
    assert len(seats) == len(set(seats)) == deployment.num_devices
    assert all(device in cluster(sizes) for device in seats)
    for replica in plan.replicas():
        tp, pp = replica.spec.tp, replica.spec.pp
        for stage in range(pp):
            assert len({node_of(device) for device in replica.devices[stage * tp : (stage + 1) * tp]}) == 1


@pytest.mark.parametrize(("nodes", "size", "tp"), [(4, 8, 4), (4, 8, 8), (2, 4, 2), (1, 8, 1)])
def test_powers_of_two_fill_a_cluster(nodes: int, size: int, tp: int) -> None:
    count = nodes * size // tp
    plan = pack(Deployment((InstanceSpec(Role.COLOCATED, tp, 1, count),)), cluster([size] * nodes))
    assert plan is not None
    assert len(set(seats_of(plan))) == nodes * size


@given(st.sampled_from([2, 4, 8]), st.integers(1, 4), st.data())
def test_units_keep_the_same_stages_of_both_phases_in_each_node(size: int, nodes: int, data: st.DataObject) -> None:
    spec = model_spec("facebook/opt-13b")
    shapes = [Shape(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 4) if tp * pp <= 8]
    found = list(units(spec, shapes, cluster([size] * nodes), size * nodes))
    if not found:
        assert size < 2
        return
    unit = data.draw(st.sampled_from(found))
    plan = pack(unit, cluster([size] * nodes))
    assert plan is not None, unit
    assert len(set(seats_of(plan))) == unit.num_devices
    for replica in plan.replicas():
        each = replica.spec.num_ranks // unit.span
        segments = [replica.devices[k * each : (k + 1) * each] for k in range(unit.span)]
        assert all(len({node_of(device) for device in segment}) == 1 for segment in segments)
        assert len({node_of(segment[0]) for segment in segments}) == unit.span
    firsts = {replica.devices[0].split(":")[0] for replica in plan.replicas()}
    assert len(firsts) == 1, "the first stages of all instances of a unit share a node"


def test_stages_are_aligned_or_not() -> None:
    spec = model_spec("facebook/opt-13b")  # 40 layers
    assert aligned(spec, 2, 4, 2)
    assert aligned(spec, 4, 8, 4)
    assert not aligned(spec, 3, 6, 3)  # 14 + 13 + 13 against 7 + 7 + 7 + 7 + 6 + 6


def test_what_is_taken_stays_taken() -> None:
    where = cluster([4])
    one = pack(Deployment((InstanceSpec(Role.COLOCATED, 2, 1, 1),)), where)
    assert one is not None
    other = pack(Deployment((InstanceSpec(Role.COLOCATED, 2, 1, 1),)), where, taken=seats_of(one))
    assert other is not None
    assert not set(seats_of(one)) & set(seats_of(other))
    assert pack(Deployment((InstanceSpec(Role.COLOCATED, 4, 1, 1),)), where, taken=seats_of(one)) is None


def test_heterogeneous_nodes_take_what_fits_them() -> None:
    plan = pack(Deployment((InstanceSpec(Role.PREFILL, 4, 1, 1), InstanceSpec(Role.DECODE, 2, 1, 1))), cluster([2, 4]))
    assert plan is not None
    prefill, decode = plan.replicas()
    assert {node_of(device) for device in prefill.devices} == {"node1"}
    assert {node_of(device) for device in decode.devices} == {"node0"}
