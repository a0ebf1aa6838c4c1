"""One phase at a time, as Algorithm 1 looks at them: a prefill side whose KV is taken away at once, a decode side whose
hand-offs come as requests arrive. Knows no cluster: KV moves in no time.

A deployment with these instances cannot attain more than they do apart. Its TTFT are those of the prefill side alone,
or later where KV waits to be pulled; its TPOT those of the decode side alone, or later by the pull.
"""

from __future__ import annotations

from dataclasses import replace

from distserve.cluster import Cluster
from distserve.costs.base import Costs, Engine
from distserve.costs.latency import Coefficients, DecodeLine, Latency, PrefillLine
from distserve.plan import InstanceSpec, Plan, Role
from distserve.specs import ModelSpec

_ENDLESS_TOKENS = 1 << 22  # of KV: what the endless side holds
_NONE = Latency(Coefficients((PrefillLine(1e-9, 1e-12, 0.0),), (DecodeLine(1, 1e-9, 0.0, 0.0),)))  # and what it takes


class ApartCosts:
    """`costs` where KV moves in no time, and the instances of shape `endless` compute prompts in no time."""

    def __init__(self, costs: Costs, endless: tuple[int, int] | None = None) -> None:
        self.name = costs.name
        self.spec: ModelSpec = costs.spec
        self.dtype = costs.dtype
        self.engine: Engine = replace(costs.engine, pull=0.0, pull_bandwidth=float("inf"))
        self._costs = costs
        self._endless = endless

    def latency(self, tp: int, pp: int) -> Latency:
        return _NONE if (tp, pp) == self._endless else self._costs.latency(tp, pp)

    def kv_blocks(self, tp: int, pp: int, kv_memory: int | float | None = None) -> int:
        if (tp, pp) != self._endless:
            return self._costs.kv_blocks(tp, pp)
        return _ENDLESS_TOKENS // self.engine.block_size

    def degrees(self) -> tuple[tuple[int, int | None], ...]:
        return self._costs.degrees()

    def assumed_cluster(self, num_devices: int) -> Cluster:
        return self._costs.assumed_cluster(num_devices)

    def notes(self, tokens: int, batch: int, context: int) -> list[str]:
        return []


def prefill_apart(costs: Costs, spec: InstanceSpec) -> tuple[Plan, ApartCosts]:
    """For requests of one output token, none of which is ever decoded."""
    return Plan((spec, replace(spec, role=Role.DECODE, count=1))), ApartCosts(costs)


def decode_apart(costs: Costs, spec: InstanceSpec) -> tuple[Plan, ApartCosts]:
    tp = costs.degrees()[0][0]
    endless = (tp, 1) if (tp, 1) != (spec.tp, spec.pp) else (tp, 2)
    return Plan((InstanceSpec(Role.PREFILL, *endless), spec)), ApartCosts(costs, endless)
