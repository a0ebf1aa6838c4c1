"""Where the ranks of a plan's instances sit in a cluster. Knows names of devices, not what moves between them.

Devices that a plan names are taken as they are. Where it names none, the best is assumed that can be said without a
search: one node, where all of the plan fits into it; else prefill and decode instances in nodes of their own, so that
KV moves over the slow link. What was assumed is said in a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from distserve.cluster import Cluster, node_of
from distserve.errors import PlanError
from distserve.plan import Plan, Replica


@dataclass(frozen=True, slots=True)
class Seats:
    """The devices of one instance."""

    devices: tuple[str, ...]  # of its ranks in (pp, tp) order, such as "node0:3"
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        assert len(self.devices) == self.tp * self.pp, (self.devices, self.tp, self.pp)


@dataclass(frozen=True, slots=True)
class Seating:
    """Where every instance of a plan sits."""

    seats: Mapping[str, Seats]  # by replica name
    notes: tuple[str, ...] = ()  # what was assumed, a sentence each


def devices_spanned(plan: Plan, node_size: int = 8) -> int:
    """Devices of the smallest cluster of equal nodes that has all devices the plan names, and as many as it needs."""
    named = [device for replica in plan.replicas() for device in replica.devices]
    nodes = [int(found[1]) + 1 for device in named if (found := re.fullmatch(r"node(\d+)", node_of(device)))]
    return max(plan.num_devices, node_size * max(nodes, default=0))


def seat(plan: Plan, cluster: Cluster) -> Seating:
    """Raises `PlanError` where a named device is not in the cluster, or the cluster has too few."""
    if plan.num_devices > cluster.num_devices:
        raise PlanError(
            f"the plan needs {plan.num_devices} devices but the cluster has {cluster.num_devices} "
            f"({cluster.describe()}): lower tp, pp or count, or take a larger cluster"
        )
    replicas = plan.replicas()
    for replica in replicas:
        for device in replica.devices:
            if device not in cluster:
                raise PlanError(f"{replica.name} is to run on {device}, but the cluster has {cluster.describe()}")
    named = {replica.name: _seats(replica, replica.devices) for replica in replicas if replica.devices}
    others = [replica for replica in replicas if not replica.devices]
    if not others:
        return Seating(named)
    taken = {device for seats in named.values() for device in seats.devices}
    node = _node_for_all(cluster, taken, sum(replica.spec.num_ranks for replica in others))
    if node is not None:
        note = f"the plan names no devices for {_who(others)}: assumed on {node}, where KV moves over the fast link"
        return Seating(named | dict(_fill(others, iter(node_devices(cluster, node, taken)))), (note,))
    note = (
        f"the plan names no devices for {_who(others)} and does not fit one node: prefill and decode instances are "
        "assumed in different nodes, so that KV moves over the slow link"
    )
    return Seating(named | dict(_apart(others, max(cluster.node_sizes))), (note,))


def node_devices(cluster: Cluster, node: str, taken: set[str]) -> list[str]:
    return [device for device in cluster.device_names() if node_of(device) == node and device not in taken]


def _node_for_all(cluster: Cluster, taken: set[str], needed: int) -> str | None:
    """The node that has room for all ranks without a device, and holds all that have one."""
    nodes = sorted({node_of(device) for device in taken}) or [f"node{number}" for number in range(cluster.nodes)]
    if taken and len(nodes) > 1:
        return None
    return next((node for node in nodes if len(node_devices(cluster, node, taken)) >= needed), None)


def _fill(replicas: list[Replica], devices: Iterator[str]) -> Iterator[tuple[str, Seats]]:
    for replica in replicas:
        yield replica.name, _seats(replica, tuple(next(devices) for _ in range(replica.spec.num_ranks)))


def _apart(replicas: list[Replica], size: int) -> Iterator[tuple[str, Seats]]:
    """Instances in nodes of their role, `size` devices each, none split between nodes that fits one."""
    room: dict[str, list[int]] = {}  # role: devices in use of each of its nodes
    for replica in replicas:
        need, used = replica.spec.num_ranks, room.setdefault(str(replica.role), [])
        node = next((number for number, count in enumerate(used) if count + need <= size), len(used))
        used += [0] * (node + -(-need // size) - len(used))
        devices: list[str] = []
        while len(devices) < need:
            if used[node] == size:
                node += 1
            devices.append(f"{replica.role}-node{node}:{used[node]}")
            used[node] += 1
        yield replica.name, _seats(replica, tuple(devices))


def _seats(replica: Replica, devices: tuple[str, ...]) -> Seats:
    return Seats(devices, replica.spec.tp, replica.spec.pp)


def _who(replicas: list[Replica]) -> str:
    names = [replica.name for replica in replicas]
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]} and {len(names) - 2} more instances"
