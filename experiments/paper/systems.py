"""What the experiments compare: plans, and the costs that each runs on. Knows no rate.

OPT-13B and OPT-66B run on the shipped fits of A100 measurements: DistServe's engine (`a100-80g`), and vLLM 0.2.3
(`a100-80g-vllm`) where whole prompts go first, as vLLM worked then. Chunked prefill, as engines work now, is given the
coefficients and the engine of DistServe: the hardware is the same, and what differs is the scheduling alone. Whole
prompts on those coefficients, too, say how much of a gain over vLLM is the scheduling's and how much the engine's.

Nobody has published fits of OPT-175B. Its costs are the datasheet's, with the waits of engines that launch each kernel
from Python (`roofline.EAGER`), and the engines' habits and memory as the shipped files have them, but that prompts are
batched up to the knee, as the paper's section 4.3 has it (8,192 tokens of OPT-175B would take 3 s).

How fast KV is pulled was measured with OPT-13B, between single GPUs. Of larger models several ranks pull at once: their
KV moves over the links of the paper's cluster.
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
from distserve.planner.choose import over_links
from experiments.paper.published import Case

DISTSERVE, VLLM = "a100-80g", "a100-80g-vllm"
PULLED = "facebook/opt-13b"
CLUSTER = Cluster.load("a100-4x8")  # section 6.1: four nodes of eight A100-80GB, 25 Gbit/s between them

APART, WHOLE, CHUNKED, SWIFT = "DistServe", "whole prompts", "chunked", "whole prompts, same engine"
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

    def costs(self) -> Costs:
        return costs(self.model, self.costs_name)


@cache
def costs(model: str, name: str) -> Costs:
    """Of a shipped file, or with its engine on the datasheet where the file does not know the model."""
    profile = Profile.load(name)
    if model in profile.models:
        known = profile.costs(model)
        return known if model == PULLED else over_links(known)
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


def together(
    model: str, tp: int, policy: Policy, pp: int = 1, *, name: str | None = None, swift: bool = False
) -> System:
    """One colocated instance. `swift`: whole prompts on DistServe's engine."""
    spec = InstanceSpec(Role.COLOCATED, tp, pp, policy=policy)
    if policy is Policy.CHUNKED:
        return System(name or CHUNKED, model, Plan((spec,)))
    return System(name or (SWIFT if swift else WHOLE), model, Plan((spec,)), DISTSERVE if swift else VLLM)


def of(case: Case) -> tuple[System, ...]:
    """The paper's placement of DistServe, and its baseline's parallelism in three ways (in two where both engines have
    the datasheet's step times)."""
    swift = together(case.model, case.baseline_tp, Policy.PREFILL_FIRST, swift=True)
    found = (
        apart(case.model, case.prefill, case.decode),
        together(case.model, case.baseline_tp, Policy.PREFILL_FIRST),
        together(case.model, case.baseline_tp, Policy.CHUNKED),
    )
    return (*found, swift) if case.model in Profile.load(DISTSERVE).models else found
