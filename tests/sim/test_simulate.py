"""Imagined runs: what must hold of every one of them, and the cases whose answer is known."""

from __future__ import annotations

import random
from copy import copy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.test_two_worlds import LATENCY, PLANS, SmallCosts, draw, spec

from distserve.cluster import Cluster
from distserve.costs.choose import choose_costs
from distserve.costs.profile import Profile
from distserve.errors import PlanError, WorkloadError
from distserve.metrics import SLO
from distserve.plan import InstanceSpec, Plan, Policy, Role
from distserve.sched.policy import AdmissionPolicy
from distserve.sim.simulate import imagine, simulate
from distserve.traces import Arrival
from distserve.workload import Workload

PAIR = PLANS["prefill and decode"]
COSTS = SmallCosts(400)
A100 = Profile.load("a100-80g").costs("facebook/opt-13b")
TP2_TP1 = Plan((InstanceSpec(Role.PREFILL, tp=2), InstanceSpec(Role.DECODE)))


def alone(prompt_tokens: int, output_tokens: int) -> Workload:
    return Workload("one", (Arrival(1.0, prompt_tokens, output_tokens),), timed=True)


def test_a_request_alone_takes_what_its_steps_take() -> None:
    """Prompt, pull, then a decode step for each further token; nothing else is in the way."""
    run = imagine(PAIR, alone(300, 20), COSTS)
    life = run.lives[0]
    assert life.first - life.arrival == pytest.approx(LATENCY.prompts([300]))
    engine = COSTS.engine
    assert engine.pull_bandwidth is not None
    kv = 300 * COSTS.spec.kv_layout(1, "bfloat16").token_bytes
    assert life.pulled - life.first == pytest.approx(engine.pull + kv / engine.pull_bandwidth)
    steps = sum(LATENCY.decodes(1, 301 + i) for i in range(19))
    assert life.last - life.pulled == pytest.approx(steps)
    split = run.split()
    total = split.queue + split.prefill + split.transfer_wait + split.transfer + split.decode
    assert total == pytest.approx(life.last - life.arrival)


def test_the_next_prompt_waits_until_the_last_ones_are_published() -> None:
    """And the first tokens do not, nor who has nothing to publish."""
    two = Workload("two", (Arrival(1.0, 300, 20), Arrival(1.001, 300, 20)), timed=True)
    shows = copy(COSTS)
    shows.engine = replace(COSTS.engine, publish=0.004, publish_bandwidth=1e9)
    kv = 300 * COSTS.spec.kv_layout(1, "bfloat16").token_bytes
    before, after = imagine(PAIR, two, COSTS).lives, imagine(PAIR, two, shows).lives
    assert after[0].first == before[0].first
    assert after[1].started - after[0].first == pytest.approx(0.004 + kv / 1e9)
    assert after[1].first - before[1].first == pytest.approx(0.004 + kv / 1e9)
    alike = Workload("two", (Arrival(1.0, 300, 1), Arrival(1.001, 300, 1)), timed=True)
    assert imagine(PAIR, alike, COSTS).records == imagine(PAIR, alike, shows).records


def test_one_token_answers_never_meet_the_decode_side() -> None:
    run = imagine(PAIR, alone(300, 1), COSTS)
    assert run.usage["decode-0"].steps == 0
    assert run.records[0].tpot is None
    assert run.end == run.lives[0].first


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_every_request_ends_and_time_runs_forward(plan: Plan) -> None:
    workload = draw(11, 9.0, 200)
    run = imagine(plan, workload, SmallCosts(120))
    for life in run.lives:
        assert life.arrival <= life.started < life.first <= life.last <= run.end
    assert [record.output_tokens for record in run.records] == [request.output_tokens for request in workload]
    assert all(record.ok for record in run.records)


@given(seed=st.integers(0, 1000), factor=st.floats(1.1, 4.0))
def test_more_load_is_never_better(seed: int, factor: float) -> None:
    """The same requests, closer together: on average they wait longer. (One of them may be luckier.)"""
    slow = draw(seed, 2.0, 60)
    fast = Workload(
        "fast",
        tuple(Arrival(r.arrival / factor, r.prompt_tokens, r.output_tokens) for r in slow),
        timed=True,
    )
    means = [simulate(PLANS["colocated, prefill-first"], w, COSTS).ttft.mean for w in (slow, fast)]
    assert means[0] is not None
    assert means[1] is not None
    assert means[1] >= means[0] - 0.010


def test_the_same_values_give_the_same_report() -> None:
    workload = Workload.load("sharegpt").draw(3.0, 300, seed=7)
    slo = SLO(0.25, 0.1)
    assert simulate(TP2_TP1, workload, A100, slo=slo) == simulate(TP2_TP1, workload, A100, slo=slo)


def test_another_replica_halves_the_work_of_each() -> None:
    workload = Workload.load("humaneval").draw(6.0, 400, seed=1)
    one = imagine(TP2_TP1, workload, A100)
    two = imagine(Plan((InstanceSpec(Role.PREFILL, tp=2, count=2), InstanceSpec(Role.DECODE, count=2))), workload, A100)
    for role in ("prefill", "decode"):
        busy = [use.busy for name, use in two.usage.items() if name.startswith(role)]
        assert len(busy) == 2
        assert max(busy) < 1.15 * min(busy)
    prefill = [use.busy for name, use in two.usage.items() if name.startswith("prefill")]
    assert sum(prefill) == pytest.approx(one.usage["prefill-0"].busy, rel=0.1)
    assert two.usage["decode-0"].context < 0.7 * one.usage["decode-0"].context


def test_a_full_decode_side_holds_up_prefill() -> None:
    """Nobody pulls what there is no room for; held KV fills the prefill side, and prompts wait."""
    crowd = Workload("crowd", tuple(Arrival(0.001 * i, 400, 60) for i in range(80)), timed=True)
    room, none = (imagine(PAIR, crowd, SmallCosts(blocks)) for blocks in (2500, 60))
    assert none.split().transfer_wait > 5 * room.split().transfer_wait
    assert none.split().queue > 2 * room.split().queue


def test_a_slow_link_delays_and_is_shared() -> None:
    """Pulls over one network link get a share each; over a fast link nobody notices them."""
    workload = Workload.load("sharegpt").draw(3.0, 200, seed=3)
    estimate = Profile.load("a100-80g-raw").costs("facebook/opt-13b")  # an engine whose pulls go over the links
    named = [
        Plan(
            (
                InstanceSpec(Role.PREFILL, tp=2, devices=(("node0:0", "node0:1"),)),
                InstanceSpec(Role.DECODE, devices=((where,),)),
            )
        )
        for where in ("node0:2", "node1:0")
    ]
    cluster = Cluster("a100-80g", 2, 8, 300e9, 3e9)
    near, far = (imagine(plan, workload, estimate, cluster=cluster).split() for plan in named)
    size = workload.mean_prompt_tokens * A100.spec.kv_layout(1, "float16").token_bytes
    assert near.transfer < 0.01
    assert far.transfer > size / 3e9  # alone it takes so long, and they are not alone


def test_who_stops_early_leaves_the_rest_unfinished() -> None:
    run = imagine(PAIR, draw(5, 4.0, 100), COSTS, stop=lambda life: life.index == 30)
    statuses = [record.status for record in run.records]
    assert statuses[30] == "ok"
    assert "unfinished" in statuses


def test_the_gateway_refuses_as_the_real_one_does() -> None:
    """By the router's own rule: what is refused is offered and missed."""
    crowd = Workload("crowd", tuple(Arrival(0.001 * i, 100, 50) for i in range(100)), timed=True)
    report = simulate(PAIR, crowd, COSTS, admission=AdmissionPolicy(max_requests=10))
    assert 0 < report.failed["refused"] < 100
    assert report.attainment.joint == pytest.approx(report.completed / 100)


def test_a_request_that_can_never_fit_is_refused_alone() -> None:
    workload = Workload("odd", (Arrival(0.0, 7000, 5), Arrival(0.1, 70, 5)), timed=True)
    run = imagine(PLANS["colocated, chunked"], workload, SmallCosts(100))
    assert [record.status for record in run.records] == ["refused", "ok"]


def test_preempted_work_is_done_again() -> None:
    """Growing answers outgrow the memory: somebody gives way, and all end all the same."""
    chance = random.Random(0)
    rows = tuple(Arrival(0.0, 60, chance.randint(200, 400)) for _ in range(20))
    run = imagine(
        Plan((spec(Role.COLOCATED, policy=Policy.PREFILL_FIRST),)), Workload("grow", rows, True), SmallCosts(60)
    )
    assert all(record.ok for record in run.records)


def test_a_prompt_that_waited_for_a_starved_sequence_starts_in_the_next_step() -> None:
    """Found by a search: the batch that ended the starvation was taken for one that repeats."""
    costs = choose_costs("Qwen/Qwen3-32B", "h100-80g")
    plan = Plan((InstanceSpec(Role.COLOCATED, count=2, policy=Policy.PREFILL_FIRST),))
    run = imagine(plan, Workload.load("sharegpt").draw(12.183, 300, seed=0), costs)
    assert all(record.ok for record in run.records)


def test_a_prompt_whose_last_piece_is_one_token_gets_its_first_token() -> None:
    """Found by a comparison with the live server: that piece looks like a sequence that decodes."""
    plan = Plan((InstanceSpec(Role.COLOCATED, policy=Policy.CHUNKED, chunk_tokens=256),))
    lonely = Workload("lonely", tuple(Arrival(float(i), n, 3) for i, n in enumerate((256, 257, 512, 513))), timed=True)
    for record in imagine(plan, lonely, SmallCosts(1000)).records:
        assert record.ttft is not None
        assert record.ttft > 0
        assert record.tpot is not None
        assert record.tpot > 0


def test_pipelines_overlap() -> None:
    """Two stages decode two batches at once: nearly twice the tokens of one stage after the other."""
    crowd = Workload("crowd", tuple(Arrival(0.0, 200, 150) for _ in range(64)), timed=True)
    costs = Profile.load("a100-80g-raw").costs("facebook/opt-13b")
    colocated = [imagine(Plan((InstanceSpec(Role.COLOCATED, pp=pp),)), crowd, costs).end for pp in (1, 2)]
    assert colocated[1] < 0.8 * colocated[0]


def test_what_cannot_be_imagined_is_said() -> None:
    with pytest.raises(WorkloadError, match="draw them with a rate"):
        imagine(TP2_TP1, Workload.load("sharegpt"), A100)
    with pytest.raises(PlanError, match="tp = 8"):
        imagine(Plan((InstanceSpec(Role.COLOCATED, tp=8),)), draw(1, 1.0, 5), A100)
    small = choose_costs("facebook/opt-66b", "l4")
    with pytest.raises(PlanError, match="does not fit"):
        imagine(Plan((InstanceSpec(Role.COLOCATED),)), draw(1, 1.0, 5), small)
