"""Where a plan's instances sit when it does not say."""

from __future__ import annotations

import pytest

from distserve.cluster import Cluster, node_of
from distserve.costs.seats import Seats, devices_spanned, seat
from distserve.errors import PlanError
from distserve.plan import InstanceSpec, Plan, Role

CLUSTER = Cluster.load("a100-4x8")


def test_named_devices_are_taken_as_they_are() -> None:
    plan = Plan(
        (
            InstanceSpec(Role.PREFILL, tp=2, devices=(("node3:0", "node3:1"),)),
            InstanceSpec(Role.DECODE, devices=(("node1:7",),)),
        )
    )
    found = seat(plan, CLUSTER)
    assert found.seats == {"prefill-0": Seats(("node3:0", "node3:1"), 2), "decode-0": Seats(("node1:7",))}
    assert not found.notes


def test_a_plan_that_fits_a_node_is_in_one() -> None:
    plan = Plan((InstanceSpec(Role.PREFILL, tp=4), InstanceSpec(Role.DECODE, tp=2, pp=2)))
    found = seat(plan, CLUSTER)
    assert found.seats["prefill-0"].devices == ("node0:0", "node0:1", "node0:2", "node0:3")
    assert found.seats["decode-0"] == Seats(("node0:4", "node0:5", "node0:6", "node0:7"), 2, 2)
    assert "prefill-0, decode-0" in found.notes[0]
    assert "fast link" in found.notes[0]


def test_beside_named_ones_the_same_node_is_filled() -> None:
    specs = (InstanceSpec(Role.PREFILL, devices=(("node2:1",),)), InstanceSpec(Role.DECODE, count=2))
    found = seat(Plan(specs), CLUSTER)
    assert [found.seats[name].devices for name in ("decode-0", "decode-1")] == [("node2:0",), ("node2:2",)]


def test_a_plan_over_several_nodes_is_assumed_apart() -> None:
    plan = Plan((InstanceSpec(Role.PREFILL, tp=4, count=3), InstanceSpec(Role.DECODE, tp=8, pp=2)))
    found = seat(plan, CLUSTER)
    nodes = {name: {node_of(device) for device in seats.devices} for name, seats in found.seats.items()}
    assert nodes["prefill-0"] == nodes["prefill-1"] == {"prefill-node0"}
    assert nodes["prefill-2"] == {"prefill-node1"}
    assert nodes["decode-0"] == {"decode-node0", "decode-node1"}
    assert "slow link" in found.notes[0]
    every = [device for seats in found.seats.values() for device in seats.devices]
    assert len(every) == len(set(every)) == plan.num_devices


def test_named_on_several_nodes_the_rest_is_apart() -> None:
    specs = (
        InstanceSpec(Role.PREFILL, count=2, devices=(("node0:0",), ("node1:0",))),
        InstanceSpec(Role.DECODE, count=4),
    )
    found = seat(Plan(specs), CLUSTER)
    assert "decode-0, decode-1 and 2 more" in found.notes[0]
    assert found.seats["decode-3"].devices == ("decode-node0:3",)


def test_what_is_not_there_is_refused() -> None:
    both = (InstanceSpec(Role.DECODE), InstanceSpec(Role.PREFILL, devices=(("node4:0",),)))
    with pytest.raises(PlanError, match=r"prefill-0 is to run on node4:0, but the cluster has node0 to node3 with 8"):
        seat(Plan(both), CLUSTER)
    with pytest.raises(PlanError, match=r"needs 33 devices but the cluster has 32 .* lower tp"):
        seat(Plan((InstanceSpec(Role.COLOCATED, count=33),)), CLUSTER)


def test_a_cluster_is_assumed_that_has_what_the_plan_names() -> None:
    far = Plan((InstanceSpec(Role.COLOCATED, devices=(("node2:1",),)),))
    assert devices_spanned(far) == 24
    assert devices_spanned(far, 4) == 12
    assert devices_spanned(Plan((InstanceSpec(Role.COLOCATED, tp=4, count=3),))) == 12
