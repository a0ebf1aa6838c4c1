"""Instances that slow each other down: only while both compute, only on one node, and as the costs say."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from tests.test_two_worlds import SmallCosts

from distserve.cluster import Cluster
from distserve.costs.base import Neighbour
from distserve.plan import InstanceSpec, Plan, Role
from distserve.sim.simulate import imagine
from distserve.traces import Arrival
from distserve.workload import Workload

APART = Plan((InstanceSpec(Role.PREFILL), InstanceSpec(Role.DECODE)))
ONE, TWO = Cluster("a100-80g", 1, 2, 1e11), Cluster("a100-80g", 2, 1, 1e11, 1e11)


def costs(prompts: float, decodes: float) -> SmallCosts:
    found = SmallCosts(10_000)
    found.engine = replace(
        found.engine, prefill_beside=Neighbour(decode=prompts), decode_beside=Neighbour(prefill=decodes)
    )
    return found


def starts(prompts: float, decodes: float, cluster: Cluster = ONE) -> dict[str, list[float]]:
    """When each instance began a step: one request decodes, and a long prompt comes in the middle of it."""
    found: dict[str, list[float]] = {}
    workload = Workload("two", (Arrival(0.0, 100, 60), Arrival(0.4, 2000, 2)), timed=True)
    run = imagine(
        APART,
        workload,
        costs(prompts, decodes),
        cluster=cluster,
        trace=lambda name, start, items: found.setdefault(name, []).append(start),
    )
    found["first tokens"] = [life.first for life in run.lives]
    return found


def gaps(times: list[float], first: float, last: float) -> list[float]:
    return [after - before for before, after in pairwise(times) if first <= before and after < last]


def test_a_decode_step_is_slowed_while_the_neighbour_reads_a_prompt() -> None:
    alone, beside = starts(1.0, 1.0), starts(1.0, 3.0)
    assert alone["prefill-0"] == beside["prefill-0"]
    begin = alone["prefill-0"][1]
    quick, slow = (gaps(run["decode-0"], begin + 0.05, begin + 0.18) for run in (alone, beside))
    assert min(slow) > 2.5 * max(quick)
    before = [gaps(run["decode-0"], 0.0, begin) for run in (alone, beside)]
    assert before[0] == pytest.approx(before[1])
    assert gaps(beside["decode-0"], begin + 0.3, 9.0)[-1] == pytest.approx(
        gaps(alone["decode-0"], 0.0, 9.0)[-1], rel=0.05
    )


def test_a_prompt_is_slowed_beside_one_that_decodes() -> None:
    alone, beside = starts(1.0, 1.0), starts(2.0, 1.0)
    assert beside["prefill-0"] == alone["prefill-0"]  # it begins when it came
    took = [run["first tokens"][1] - run["prefill-0"][1] for run in (alone, beside)]
    assert took[1] == pytest.approx(2 * took[0], rel=0.05)


def test_nobody_is_slowed_from_another_node() -> None:
    assert starts(2.0, 3.0, TWO) == starts(1.0, 1.0, TWO)
