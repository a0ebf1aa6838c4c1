"""Which cells are measured: plans with their sizes written down, targets and rates that the simulator chooses."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.validate.support import MODEL, load_costs, write_costs

from distserve.costs.profile import ProfileCosts
from distserve.errors import UsageError
from distserve.metrics import SLO
from distserve.plan import InstanceSpec, Plan, Role
from distserve.sim.simulate import simulate
from distserve.validate import grid
from distserve.validate.record import Key
from distserve.workload import Workload

CHAT = Workload.load("sharegpt").scaled(0.25, 0.25)


@pytest.fixture
def costs(tmp_path: Path) -> ProfileCosts:
    return load_costs(write_costs(tmp_path / "costs.json"))


@pytest.mark.parametrize("name", list(grid.PLANS))
def test_a_pinned_plan_is_predicted_as_the_plan_itself(costs: ProfileCosts, name: str) -> None:
    plan = grid.PLANS[name]
    served = grid.pinned(plan, costs, MODEL, "cpu")
    assert served.model == MODEL
    assert all(spec.kv_memory == 1 << 30 for spec in served.instances)
    sizes = [spec.max_batch_tokens or spec.chunk_tokens for spec in served.instances if spec.role is not Role.DECODE]
    assert all(sizes)
    assert Plan.from_toml(served.to_toml()) == served
    drawn = CHAT.draw(2.0, 100)
    assert simulate(served, drawn, costs) == simulate(plan, drawn, costs)


def test_sizes_that_a_plan_names_stay(costs: ProfileCosts) -> None:
    plan = Plan((InstanceSpec(Role.COLOCATED, chunk_tokens=300, kv_memory=5 << 20),))
    (spec,) = grid.pinned(plan, costs, MODEL, "cpu").instances
    assert (spec.chunk_tokens, spec.kv_memory) == (300, 5 << 20)


def test_rates_reach_from_where_all_is_well_to_where_little_is(costs: ProfileCosts) -> None:
    plan = grid.pinned(grid.PLANS["1p1d"], costs, MODEL, "cpu")
    chosen = grid.choose(plan, CHAT, costs, rates=(), slos=(), goal=0.9, number=5)
    assert len(chosen.slos) == 2
    tight, loose = chosen.slos
    assert tight.ttft is not None
    assert tight.tpot is not None
    assert loose.ttft == pytest.approx(2 * tight.ttft, rel=0.05)
    assert len(chosen.rates) == 5
    attained = [simulate(plan, CHAT.draw(r, 400), costs, slo=loose).attainment.joint for r in chosen.rates]
    assert attained[0] > 0.95
    assert attained[-1] < 0.9


def test_what_is_given_is_not_chosen(costs: ProfileCosts) -> None:
    chosen = grid.choose(
        grid.PLANS["1p1d"], CHAT, costs, rates=(1.0, 2.0), slos=(SLO(1.0),), goal=0.9, number=5
    )  # fmt: skip
    assert (chosen.rates, chosen.slos) == ((1.0, 2.0), (SLO(1.0),))


def test_targets_that_nothing_attains_are_refused(costs: ProfileCosts) -> None:
    with pytest.raises(UsageError, match="not even an idle system attains 90%"):
        grid.choose(grid.PLANS["1p1d"], CHAT, costs, rates=(), slos=(SLO(1e-6),), goal=0.9, number=5)


def test_lengths_are_scaled_and_cut_to_the_context() -> None:
    plain, scaled = grid.Lengths.load("humaneval"), grid.Lengths.load("humaneval:0.5,2")
    assert scaled.name == "humaneval:0.5,2"
    assert scaled.workload.mean_prompt_tokens == pytest.approx(plain.workload.mean_prompt_tokens / 2, rel=0.01)
    assert scaled.workload.mean_output_tokens == pytest.approx(plain.workload.mean_output_tokens * 2, rel=0.01)
    both = grid.Lengths.load("humaneval:0.5")
    assert both.workload.mean_output_tokens == pytest.approx(plain.workload.mean_output_tokens / 2, rel=0.01)
    (note,) = grid.Lengths.load("longbench").clipped(1024).workload.notes
    assert "were cut to the context of 1024 tokens" in note


def test_plans_by_name_and_by_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[[instances]]\nrole = "colocated"\n')
    assert grid.load_plan(str(file)) == ("mine", Plan((InstanceSpec(Role.COLOCATED),)))
    assert grid.load_plan("2c-whole")[0] == "2c-whole"
    with pytest.raises(UsageError, match="none of 1p1d, 2c-whole, 2c-chunked"):
        grid.load_plan("3c")


def test_every_plan_is_measured_once_before_any_is_twice() -> None:
    cells = grid.cells(["a", "b"], ["v", "w"], lambda plan, workload: (1.0, 2.0), 7, 2)
    assert len(set(cells)) == len(cells) == 16
    assert [key.repeat for key in cells] == [0] * 8 + [1] * 8
    assert cells[0] == Key("a", "v", 1.0, 7, 0)
    again = cells[0]._replace(repeat=1)
    assert grid.offered(again, CHAT, 30.0, None) == grid.offered(cells[0], CHAT, 30.0, None)
    assert len(grid.offered(cells[0], CHAT, 30.0, None)) == 30
