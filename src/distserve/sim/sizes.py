"""The sizes that a world chooses where a plan does not say, written into the plan: what was imagined is then what is
served, and not what a server measures at its start on whatever the machine does that minute."""

from __future__ import annotations

from dataclasses import replace

from distserve.costs.base import Costs
from distserve.plan import InstanceSpec, Plan, Policy, Role
from distserve.sim.world import policies


def sized(plan: Plan, costs: Costs) -> Plan:
    """Of each instance, as far as the plan leaves them open: the tokens of its batches, and where the costs say how
    much KV memory an instance has, that."""
    return replace(plan, instances=tuple(_sized(spec, costs) for spec in plan.instances))


def _sized(spec: InstanceSpec, costs: Costs) -> InstanceSpec:
    usual = policies(costs.engine, costs.latency(spec.tp, spec.pp).knee())
    kv_memory = spec.kv_memory if spec.kv_memory is not None else costs.engine.kv_memory
    spec = replace(spec, kv_memory=kv_memory)
    if spec.role is Role.PREFILL:
        return replace(spec, max_batch_tokens=spec.max_batch_tokens or usual.prefill.max_batch_tokens)
    if spec.role is Role.COLOCATED and spec.policy is Policy.PREFILL_FIRST:
        return replace(spec, max_batch_tokens=spec.max_batch_tokens or usual.colocated.max_batch_tokens)
    if spec.role is Role.COLOCATED:
        return replace(spec, chunk_tokens=spec.chunk_tokens or spec.max_batch_tokens or usual.colocated.chunk_tokens)
    return spec
