"""Where each rank sits: names of devices for a deployment. Knows nodes and their sizes, not what is computed.

    the ranks of one stage (a tensor-parallel group) sit in one node
    an instance sits in one node where it fits; else its stages are laid over several
    a unit with a span sits in as many nodes, the same stages of all its instances in each of them

What is large is seated first, in the node that it fills best. Where that fails, the nodes with most room are tried
first; where both fail, the answer is that it does not fit (nodes of which nobody could say it by counting devices: a
node of 8 holds two groups of 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from distserve.cluster import Cluster
from distserve.plan import InstanceSpec, Plan
from distserve.planner.candidates import Deployment

_Seats = list[str]
_Choice = int  # 1: of the nodes that have room the one with the least is taken, -1: the one with the most


def pack(
    deployment: Deployment, cluster: Cluster, model: str | None = None, *, taken: Sequence[str] = ()
) -> Plan | None:
    """The plan with its seats, or None where they do not fit beside the devices that are taken."""
    for choice in (1, -1):
        seats = _Room(cluster, taken).seat(deployment, choice)
        if seats is not None:
            groups = tuple(
                replace(spec, count=spec.count * deployment.copies, devices=tuple(map(tuple, seats[at])))
                for at, spec in enumerate(deployment.groups)
            )
            return Plan(groups, model, cluster.device)
    return None


class _Room:
    """Free devices of each node."""

    def __init__(self, cluster: Cluster, taken: Sequence[str]) -> None:
        self._free = [[name for name in node if name not in taken] for node in _names(tuple(cluster.node_sizes))]
        self._room = [len(free) for free in self._free]

    def seat(self, deployment: Deployment, choice: _Choice) -> list[list[_Seats]] | None:
        """By group: the devices of each instance in (pp, tp) order."""
        if deployment.span:
            return self._units(deployment, choice)
        wanted = [
            (at, spec) for at, spec in enumerate(deployment.groups) for _ in range(spec.count * deployment.copies)
        ]
        wanted.sort(key=lambda entry: (-entry[1].num_ranks, -entry[1].tp))
        found: list[list[_Seats]] = [[] for _ in deployment.groups]
        for at, spec in wanted:
            seats = self._instance(spec, choice)
            if seats is None:
                return None
            found[at].append(seats)
        return found

    def _instance(self, spec: InstanceSpec, choice: _Choice) -> _Seats | None:
        node = self._node(spec.num_ranks, choice)
        if node is not None:
            return self._take(node, spec.num_ranks)
        seats: _Seats = []
        for _ in range(spec.pp):
            node = self._node(spec.tp, choice)
            if node is None:
                return None
            seats += self._take(node, spec.tp)
        return seats

    def _units(self, deployment: Deployment, choice: _Choice) -> list[list[_Seats]] | None:
        found: list[list[_Seats]] = [[] for _ in deployment.groups]
        segment = deployment.unit_devices // deployment.span
        for _ in range(deployment.copies):
            nodes: list[int] = []
            for _ in range(deployment.span):
                node = self._node(segment, choice, but=nodes)
                if node is None:
                    return None
                nodes.append(node)
            for at, spec in enumerate(deployment.groups):
                for _ in range(spec.count):
                    each = spec.num_ranks // deployment.span
                    found[at].append([device for node in nodes for device in self._take(node, each)])
        return found

    def _node(self, needed: int, choice: _Choice, but: Sequence[int] = ()) -> int | None:
        found, least = None, 0
        for node, room in enumerate(self._room):
            if room >= needed and (found is None or choice * room < least) and node not in but:
                found, least = node, choice * room
        return found

    def _take(self, node: int, number: int) -> _Seats:
        seats, self._free[node] = self._free[node][:number], self._free[node][number:]
        self._room[node] -= number
        return seats


@cache
def _names(sizes: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    """Of the devices of each node."""
    return tuple(tuple(f"node{node}:{i}" for i in range(size)) for node, size in enumerate(sizes))
