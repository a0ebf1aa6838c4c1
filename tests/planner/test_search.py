"""The search finds what looking at everything finds, and nothing that arithmetic rules out attains the goal."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from tests.planner.small import costs, demand, world

from distserve.costs.base import Pace, Weather
from distserve.plan import InstanceSpec, Policy, Role
from distserve.planner.ask import Question, ask
from distserve.planner.bounds import Bounds
from distserve.planner.candidates import Deployment
from distserve.planner.goodput import USUAL
from distserve.planner.jobs import Jobs
from distserve.planner.known import CELL, Known
from distserve.planner.pack import pack
from distserve.planner.search import COLOCATED, DISAGGREGATED, Search


def everything(number: int) -> list[Deployment]:
    """All deployments of so many devices (up to 4 in one node) of a model with tp and pp of 1, 2 and 4."""
    shapes = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 4) if tp * pp <= number]
    found = []
    for tp, pp in shapes:
        count, rest = divmod(number, tp * pp)
        if not rest:
            found += [
                Deployment((InstanceSpec(Role.COLOCATED, tp, pp, count, policy),))
                for policy in (None, Policy.PREFILL_FIRST)
            ]
        for other_tp, other_pp in shapes:
            for n in range(1, number):
                left = number - n * tp * pp
                if left > 0 and left % (other_tp * other_pp) == 0:
                    m = left // (other_tp * other_pp)
                    groups = InstanceSpec(Role.PREFILL, tp, pp, n), InstanceSpec(Role.DECODE, other_tp, other_pp, m)
                    found.append(Deployment(groups))
    return found


@pytest.mark.parametrize(
    ("rate", "slo", "kinds"),
    [
        (8.0, "ttft=0.125,tpot=0.2", (DISAGGREGATED, COLOCATED)),
        (30.0, "ttft=0.125,tpot=0.1", (DISAGGREGATED,)),
        (14.0, "ttft=0.2,tpot=0.04", (DISAGGREGATED,)),
        (25.0, "ttft=0.08,tpot=0.06", (DISAGGREGATED, COLOCATED)),
    ],
)
def test_the_fewest_devices_are_those_of_an_exhaustive_search(rate: float, slo: str, kinds: tuple[str, ...]) -> None:
    where = world(demand(slo), "a100-1x3")
    with Jobs(where) as jobs:
        search = Search(where, jobs)
        found = search.fewest(rate, kinds)
        expected: set[Deployment] = set()
        for number in range(1, 4):
            for deployment in everything(number):
                kind = COLOCATED if len(deployment.groups) == 1 else DISAGGREGATED
                plan = pack(deployment, where.cluster, where.model)
                if kind in kinds and plan:
                    question = Question(plan, rate, search.stay(deployment), length=USUAL)
                    if ask(where, question).attains:
                        expected.add(deployment)
            if expected:
                break
    assert {each.deployment for each in found} == expected


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("workload", ["humaneval", "sharegpt"])
def test_no_instance_attains_more_than_the_bound(role: Role, tp: int, pp: int, workload: str) -> None:
    asked = demand("ttft=5,tpot=1", workload, goal=0.9)
    bounds = Bounds(costs(), asked)
    spec = InstanceSpec(role, tp, pp)
    most = bounds.most(spec)
    assert 0 < most < 1000
    if role is not Role.COLOCATED or workload == "humaneval":
        question = Question(spec, most * 1.05, bounds.stay(spec), length=USUAL)
        assert not ask(world(asked), question).attains


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_the_bound_counts_on_a_machines_best_moment(role: Role) -> None:
    quicker = copy.copy(costs())
    quicker.engine = replace(quicker.engine, weather=Weather((Pace(0.0, 0.8, 0.8), Pace(5.0, 2.0, 2.0)), 5.1))
    asked, spec = demand("ttft=5,tpot=1"), InstanceSpec(role)
    bounds = Bounds(quicker, asked)
    most = bounds.most(spec)
    assert most == pytest.approx(Bounds(costs(), asked).most(spec) / 0.8)
    question = Question(spec, most * 1.05, bounds.stay(spec), length=USUAL)
    assert not ask(replace(world(asked), costs=quicker), question).attains


def test_targets_that_no_idle_instance_meets_have_no_rate() -> None:
    bounds = Bounds(costs(), demand("ttft=0.01,tpot=0.1"))
    assert bounds.most(InstanceSpec(Role.PREFILL)) == 0
    assert bounds.most(InstanceSpec(Role.DECODE)) > 0
    assert Bounds(costs(), demand("ttft=1,tpot=0.01")).most(InstanceSpec(Role.DECODE)) == 0


def test_the_highest_rate_is_not_below_that_of_any_deployment() -> None:
    where = world(demand("ttft=0.125,tpot=0.1"), "a100-1x2")
    with Jobs(where) as jobs:
        search = Search(where, jobs)
        best = search.highest()[0]
        assert best.num_devices <= 2
        for deployment in everything(2):
            plan = pack(deployment, where.cluster)
            assert plan is not None
            verdict = ask(where, Question(plan, best.goodput * 1.06, search.stay(deployment), length=USUAL))
            assert not verdict.attains, deployment


def test_low_affinity_copies_units_inside_nodes() -> None:
    where = world(demand("ttft=0.2,tpot=0.04"), "a100-2x2")
    with Jobs(where) as jobs:
        found = Search(where, jobs, low_affinity=True).fewest(16.0, [DISAGGREGATED])
    assert found
    for each in found:
        assert each.deployment.span >= 1
        for unit in range(each.deployment.copies):
            nodes = {replica.devices[0].split(":")[0] for replica in each.plan.replicas()}
            assert len(nodes) == each.deployment.copies * each.deployment.span or unit == 0


def test_several_processes_find_the_same() -> None:
    where = world(demand("ttft=0.125,tpot=0.1"), "a100-1x2")
    answers = []
    for processes in (1, 2):
        with Jobs(where, processes) as jobs:
            answers.append([(str(f.deployment), f.verdict) for f in Search(where, jobs).fewest(9.0)])
    assert answers[0] == answers[1]
    assert answers[0]


def test_one_answer_says_more_than_itself() -> None:
    known = Known()
    spec = InstanceSpec(Role.PREFILL, count=2)
    assert known.attains(spec, 1.0) is None
    known.learn(spec, 10.0, True)
    known.learn(spec, 14.0, False)
    assert known.attains(spec, 9.0) is True
    assert known.attains(spec, 12.0) is None
    assert known.attains(spec, 14.0) is False
    assert known.attains(InstanceSpec(Role.PREFILL, count=4), 20.0) is True  # two by two
    assert known.attains(InstanceSpec(Role.PREFILL, count=3), 20.0) is None
    assert known.attains(InstanceSpec(Role.PREFILL, count=1), 7.0) is False  # a burst is shared by fewer
    assert known.attains(InstanceSpec(Role.PREFILL, count=4), 28.0) is None  # four may share it better
    known.learn(InstanceSpec(Role.PREFILL, count=CELL), 30.0, False)
    assert known.attains(InstanceSpec(Role.PREFILL, count=2 * CELL), 70.0) is False
    assert known.attains(InstanceSpec(Role.DECODE, count=2), 9.0) is None
    assert known.below(InstanceSpec(Role.PREFILL, count=4)) == 20.0
    assert known.above(InstanceSpec(Role.PREFILL, count=1)) == 7.0
