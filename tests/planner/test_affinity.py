"""How many requests links can bear: the arithmetic by kinds of instances against all pairs of them, one by one."""

from __future__ import annotations

import random

import pytest

from distserve.cluster import Cluster
from distserve.costs.base import Costs
from distserve.costs.choose import choose_costs
from distserve.costs.memory import kv_token_bytes
from distserve.costs.network import Link, Links
from distserve.costs.seats import Seats
from distserve.metrics import Targets
from distserve.plan import Plan, Role
from distserve.planner.affinity import network_bound
from distserve.planner.candidates import Deployment, Shape, decode_spec, prefill_spec
from distserve.planner.demand import Demand
from distserve.planner.pack import pack
from distserve.workload import Workload

DEMAND = Demand(Workload.load("humaneval"), Targets.parse(["ttft=1"]))


def pair_by_pair(costs: Costs, cluster: Cluster, plan: Plan) -> float:
    links = Links(cluster)
    seats = {role: [Seats(r.devices, r.spec.tp, r.spec.pp) for r in plan.replicas() if r.role is role] for role in Role}
    pairs = [(one, other) for one in seats[Role.PREFILL] for other in seats[Role.DECODE]]
    size = DEMAND.pulled_tokens * kv_token_bytes(costs.spec, dtype=costs.dtype)
    seconds: dict[Link, float] = {}
    for one, other in pairs:
        for link, share in links.route(costs.spec, one, other).loads:
            seconds[link] = seconds.get(link, 0.0) + share * size / len(pairs) / links.capacity(link)
    return 1 / max(seconds.values())


@pytest.mark.parametrize(("model", "name"), [("facebook/opt-66b", "a100-4x8"), ("Qwen/Qwen3-32B", "a100-32x8")])
def test_kinds_of_instances_say_what_all_pairs_say(model: str, name: str) -> None:
    chance, costs, cluster = random.Random(5), choose_costs(model, "a100-80g"), Cluster.load(name)
    judged = 0
    for _ in range(60):
        first, second = (Shape(chance.choice((1, 2, 4, 8)), chance.choice((1, 2, 3))) for _ in range(2))
        groups = prefill_spec(first, chance.randint(1, 4)), decode_spec(second, chance.randint(1, 4))
        plan = pack(Deployment(groups), cluster)
        if plan is None:
            continue
        exact = pair_by_pair(costs, cluster, plan)
        assert network_bound(costs, cluster, DEMAND, plan) == pytest.approx(exact)
        for enough in (0.5 * exact, 0.99 * exact, 1.01 * exact, 3 * exact):
            quick = network_bound(costs, cluster, DEMAND, plan, enough)
            assert quick >= exact * (1 - 1e-9), "it may be too high, never too low"
            assert (quick >= enough) <= (exact >= enough), "what is not enough is never taken for enough"
        judged += 1
    assert judged > 20
