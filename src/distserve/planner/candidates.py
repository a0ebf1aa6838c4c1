"""What may be deployed: shapes of instances that fit, and deployments made of them. Knows no rate and no target.

A deployment is `copies` of a unit, and a unit is groups of equal instances:

    high affinity    one unit: n prefill and m decode instances (or c colocated ones, or all three), anywhere
    low affinity     units that keep KV inside a node: each node of a unit holds the same stages of its prefill and of
                     its decode instances (DistServe, OSDI'24, section 4.2), in any number that fits the node
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from distserve.cluster import Cluster
from distserve.costs.base import Costs
from distserve.costs.memory import allowed_pp, stage_layers
from distserve.errors import PlanError
from distserve.plan import InstanceSpec, Plan, Policy, Role
from distserve.specs import ModelSpec

MAX_RANKS = 16  # devices of an instance that are tried: more stages only add waits, more instances do not


@dataclass(frozen=True, slots=True)
class Shape:
    """How one instance is split."""

    tp: int
    pp: int

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp


@dataclass(frozen=True, slots=True)
class Deployment:
    """See the head of this file."""

    groups: tuple[InstanceSpec, ...]  # of one unit
    copies: int = 1
    span: int = 0  # nodes that a unit takes its stages apart over; 0: its instances sit anywhere

    @property
    def unit_devices(self) -> int:
        return sum(spec.num_ranks * spec.count for spec in self.groups)

    @property
    def num_devices(self) -> int:
        return self.copies * self.unit_devices

    def count(self, role: Role) -> int:
        """Instances of a role."""
        return self.copies * sum(spec.count for spec in self.groups if spec.role is role)

    def unit(self) -> Plan:
        return Plan(self.groups)

    def plan(self, model: str | None = None, device: str | None = None) -> Plan:
        """Without seats."""
        groups = tuple(replace(spec, count=spec.count * self.copies) for spec in self.groups)
        return Plan(groups, model, device)

    def __str__(self) -> str:
        return " + ".join(_say(replace(spec, count=spec.count * self.copies)) for spec in self.groups)


def _say(spec: InstanceSpec) -> str:
    what = f"{spec.count} {spec.role} tp{spec.tp}" + (f" pp{spec.pp}" if spec.pp > 1 else "")
    return what + (f" {spec.policy}" if spec.policy is Policy.PREFILL_FIRST else "")


def shapes(costs: Costs, cluster: Cluster, longest: int, max_devices: int) -> list[Shape]:
    """Those that fit the memory with the longest request's KV, smallest first. Raises `PlanError` where none does."""
    found, reason = [], ""
    most = min(max_devices, cluster.num_devices)
    for shape in _known(costs):
        if shape.tp > max(cluster.node_sizes) or shape.num_ranks > min(most, MAX_RANKS):
            continue
        try:
            tokens = costs.kv_blocks(shape.tp, shape.pp) * costs.engine.block_size
        except PlanError as error:
            reason = str(error)
            continue
        if tokens >= longest:
            found.append(shape)
        else:
            reason = (
                f"tp = {shape.tp}, pp = {shape.pp} has room for the KV of {tokens} tokens, the longest request has "
                f"{longest}"
            )
    if not found:
        raise PlanError(
            f"no instance fits {most} devices ({cluster.describe()}): "
            f"{reason or 'no parallelism that the costs know does'}; "
            "take a larger cluster or device, or a smaller model"
        )
    return sorted(found, key=lambda shape: (shape.num_ranks, shape.tp))


def _known(costs: Costs) -> Iterator[Shape]:
    """What the costs answer for, each once; where they do for any number of stages, those of equally many layers."""
    shapes = {
        Shape(tp, stages) for tp, pp in costs.degrees() for stages in (allowed_pp(costs.spec) if pp is None else (pp,))
    }
    yield from sorted(shapes, key=lambda shape: (shape.tp, shape.pp))


def policies(costs: Costs, cluster: Cluster) -> tuple[Policy, ...]:
    return (Policy.CHUNKED, Policy.PREFILL_FIRST)


def pairs_of(prefill: Shape, decode: Shape, num_devices: int) -> Iterator[tuple[int, int]]:
    """Every (n, m) that takes exactly so many devices."""
    for n in range(1, num_devices // prefill.num_ranks + 1):
        m, rest = divmod(num_devices - n * prefill.num_ranks, decode.num_ranks)
        if m >= 1 and not rest:
            yield n, m


def prefill_spec(shape: Shape, count: int) -> InstanceSpec:
    return InstanceSpec(Role.PREFILL, shape.tp, shape.pp, count)


def decode_spec(shape: Shape, count: int) -> InstanceSpec:
    return InstanceSpec(Role.DECODE, shape.tp, shape.pp, count)


def colocated_spec(shape: Shape, count: int, policy: Policy) -> InstanceSpec:
    return InstanceSpec(Role.COLOCATED, shape.tp, shape.pp, count, None if policy is Policy.CHUNKED else policy)


def units(spec: ModelSpec, found: list[Shape], cluster: Cluster, max_devices: int) -> Iterator[Deployment]:
    """Algorithm 2's: one unit each, `span` nodes wide."""
    size = max(cluster.node_sizes)
    for span in range(1, cluster.nodes + 1):
        fitting = [s for s in found if s.pp % span == 0 and s.num_ranks // span <= size]
        for first in fitting:
            for second in fitting:
                if span > 1 and not aligned(spec, first.pp, second.pp, span):
                    continue
                for n, m in _counts(first.num_ranks // span, second.num_ranks // span, size):
                    unit = Deployment((prefill_spec(first, n), decode_spec(second, m)), 1, span)
                    if unit.num_devices <= max_devices:
                        yield unit


def aligned(spec: ModelSpec, first: int, second: int, span: int) -> bool:
    """Whether the stages of two pipelines, cut into `span` segments, hold the same layers in each."""
    one, other = stage_layers(spec, first), stage_layers(spec, second)
    return all(sum(one[: k * first // span]) == sum(other[: k * second // span]) for k in range(1, span))


def _counts(first: int, second: int, size: int) -> Iterator[tuple[int, int]]:
    for n in range(1, size // first + 1):
        for m in range(1, (size - n * first) // second + 1):
            if _coprime(n, m):  # else it is copies of a smaller unit
                yield n, m


def _coprime(n: int, m: int) -> bool:
    while m:
        n, m = m, n % m
    return n == 1
