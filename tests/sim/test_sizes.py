"""What a plan leaves open is written down as the simulator chose it, and nothing is predicted otherwise for it."""

from __future__ import annotations

import pytest

from distserve.costs.choose import choose_costs
from distserve.plan import InstanceSpec, Plan, Policy, Role
from distserve.sim.simulate import imagine
from distserve.sim.sizes import sized
from distserve.workload import Workload

COSTS = choose_costs("facebook/opt-13b", "a100-80g", "a100-80g")
PLANS = [
    Plan((InstanceSpec(Role.PREFILL, tp=2), InstanceSpec(Role.DECODE))),
    Plan((InstanceSpec(Role.COLOCATED, count=2, policy=Policy.PREFILL_FIRST),)),
    Plan((InstanceSpec(Role.COLOCATED, tp=2),)),
]


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_with_its_sizes_is_predicted_as_without(plan: Plan) -> None:
    workload = Workload.load("sharegpt").draw(2.0, 200)
    written = sized(plan, COSTS)
    assert written != plan
    assert imagine(written, workload, COSTS).records == imagine(plan, workload, COSTS).records
    assert sized(written, COSTS) == written


def test_what_a_plan_says_stays() -> None:
    plan = Plan((InstanceSpec(Role.PREFILL, max_batch_tokens=99), InstanceSpec(Role.DECODE, kv_memory=1 << 30)))
    assert sized(plan, COSTS) == plan
