"""What the experiments compare: plans, and the costs that each runs on. Knows no rate.

OPT-13B and OPT-66B run on the shipped fits of A100 measurements: DistServe's engine (`a100-80g`), and vLLM 0.2.3
(`a100-80g-vllm`) where whole prompts go first, as vLLM worked then. Chunked prefill, as engines work now, is given the
coefficients and the engine of DistServe: the hardware is the same, and what differs is the scheduling alone.

Nobody has published fits of OPT-175B. Its costs are the datasheet's, with the waits of engines that launch each kernel
from Python (`roofline.EAGER`), and the engines' habits and memory as the shipped files have them, but for two that were
observed with OPT-13B on single GPUs: KV moves over the links of the paper's cluster, and prompts are batched up to the
knee, as the paper's section 4.3 has it (8,192 tokens of OPT-175B would take 3 s).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from distserve.catalogue import model_spec
from distserve.cluster import Cluster
from distserve.costs.base import Costs
from distserve.costs.devices import device
from distserve.costs.estimate import EstimatedCosts
from distserve.costs.profile import Profile
from distserve.costs.roofline import EAGER
from distserve.plan import InstanceSpec, Plan, Policy, Role
from experiments.paper.published import Case

DISTSERVE, VLLM = "a100-80g", "a100-80g-vllm"
CLUSTER = Cluster.load("a100-4x8")  # section 6.1: four nodes of eight A100-80GB, 25 Gbit/s between them

APART, WHOLE, CHUNKED = "DistServe", "whole prompts", "chunked"
# which published curve each is held against
PUBLISHED = {APART: "DistServe", WHOLE: "vLLM", CHUNKED: "DeepSpeed-MII"}


@dataclass(frozen=True)
class System:
    """One line of a figure."""

    name: str
    model: str
    plan: Plan
    costs_name: str = DISTSERVE

    @property
    def devices(self) -> int:
        return self.plan.num_devices

    @property
    def piped(self) -> bool:
        """Pipelines are simulated step by step, which takes ten times as long."""
        return any(spec.pp > 1 for spec in self.plan.instances)

    def costs(self) -> Costs:
        return costs(self.model, self.costs_name)


@cache
def costs(model: str, name: str) -> Costs:
    """Of a shipped file, or with its engine on the datasheet where the file does not know the model."""
    profile = Profile.load(name)
    if model in profile.models:
        return profile.costs(model)
    contents = profile.contents
    return EstimatedCosts(
        model_spec(model),
        device(contents.device),
        dtype=contents.dtype,
        engine=replace(contents.engine, pull_bandwidth=None, prefill_batch_tokens=None),
        accounting=contents.accounting,
        efficiency=EAGER,
        tables=False,
    )


def apart(model: str, prefill: tuple[int, int], decode: tuple[int, int], name: str = APART) -> System:
    """One prefill and one decode instance, as Algorithm 2 seats them: where they do not fit one node, each node holds
    the same stages of both."""
    specs = [InstanceSpec(Role.PREFILL, *prefill), InstanceSpec(Role.DECODE, *decode)]
    if sum(spec.num_ranks for spec in specs) > max(CLUSTER.node_sizes):
        assert prefill[1] == decode[1], "stages that pair up"
        first = 0
        for at, spec in enumerate(specs):
            seats = tuple(f"node{stage}:{first + rank}" for stage in range(spec.pp) for rank in range(spec.tp))
            specs[at] = replace(spec, devices=(seats,))
            first += spec.tp
    return System(name, model, Plan(tuple(specs)))


def together(model: str, tp: int, policy: Policy, pp: int = 1, name: str | None = None) -> System:
    """One colocated instance."""
    whole = policy is Policy.PREFILL_FIRST
    spec = InstanceSpec(Role.COLOCATED, tp, pp, policy=policy)
    return System(name or (WHOLE if whole else CHUNKED), model, Plan((spec,)), VLLM if whole else DISTSERVE)


def of(case: Case) -> tuple[System, ...]:
    """The paper's placement of DistServe, and its baseline's parallelism with both policies."""
    return (
        apart(case.model, case.prefill, case.decode),
        together(case.model, case.baseline_tp, Policy.PREFILL_FIRST),
        together(case.model, case.baseline_tp, Policy.CHUNKED),
    )
