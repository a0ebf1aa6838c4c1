"""Where an error comes from: a machine that was slower than its costs is told from a twin that queues wrongly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.validate.support import MODEL, load_costs, run_of, write_costs

from distserve.costs.base import Pace, Weather
from distserve.metrics import default_warmup
from distserve.plan import Role
from distserve.sim.simulate import imagine
from distserve.validate import grid, others
from distserve.validate.compare import judged, lived
from distserve.validate.explain import STEP, as_measured, expected, steps
from distserve.validate.record import Key, Measured
from distserve.validate.steps import Step
from distserve.workload import Workload

CHAT = Workload.load("sharegpt").scaled(0.25, 0.25)


@pytest.mark.parametrize("name", ["1p1d", "2c-chunked"])
def test_an_error_of_the_steps_is_found_and_what_is_left_is_nothing(tmp_path: Path, name: str) -> None:
    costs = load_costs(write_costs(tmp_path / "costs.json"))
    slower = load_costs(write_costs(tmp_path / "slower.json", 1.5))
    plan = grid.pinned(grid.PLANS[name], costs, MODEL, "cpu")
    drawn = CHAT.draw(2.0, 150)
    run, lives = run_of(Key(name, "chat", 2.0, 0, 0), plan, slower, drawn), imagine(plan, drawn, slower)
    told = {}
    for role in map(str, Role):
        mine = [usage for each, usage in lives.usage.items() if each.startswith(role)]
        if mine:
            told[f"{STEP} {role} sum"] = sum(usage.busy for usage in mine)
            told[f"{STEP} {role} count"] = float(sum(usage.steps for usage in mine))
    run = Measured(run.key, run.warmup, run.end, run.records, server=told)
    found = steps(run, (imagine(plan, drawn, costs),))
    assert all(1.3 < each.ratio < 1.8 for each in found.values())
    assert set(found) == ({"prefill", "decode"} if name == "1p1d" else {"colocated"})
    cell = judged(lived((run,), plan, costs), grid.idle_slos(plan, CHAT, costs)[0])
    assert abs(cell.error) > 0.1
    assert cell.rest is not None
    assert abs(cell.rest) < 0.02


def test_a_server_that_tells_nothing_explains_nothing(tmp_path: Path) -> None:
    costs = load_costs(write_costs(tmp_path / "costs.json"))
    plan = grid.pinned(grid.PLANS["1p1d"], costs, MODEL, "cpu")
    run = run_of(Key("1p1d", "chat", 2.0, 0, 0), plan, costs, CHAT.draw(2.0, 20))
    assert as_measured(run, plan, costs) is None


def test_a_slow_spell_is_found_in_the_steps_and_lived_through_again(tmp_path: Path) -> None:
    """What the twin is told of each step is enough to imagine the very run: nothing else was different."""
    costs = load_costs(write_costs(tmp_path / "costs.json"))
    plan = grid.pinned(grid.PLANS["1p1d"], costs, MODEL, "cpu")
    drawn = CHAT.draw(2.0, 120)
    spells = {
        "prefill-0": Weather((Pace(0.0, 1.0, 1.0), Pace(20.0, 3.0, 1.0), Pace(30.0, 1.0, 1.0))),
        "decode-0": Weather((Pace(0.0, 1.0, 1.1), Pace(35.0, 1.0, 1.6))),
    }
    real = imagine(plan, drawn, costs, weather=spells)
    coefficients = costs.latency(1, 1).coefficients
    told = {}
    for name, weather in spells.items():
        found_in: list[Step] = []
        for pace in weather.paces:
            if name == "prefill-0":
                step = Step(0.0, coefficients.prompts(64, 4096) * pace.prompts, 64, 4096, 0, 0)
            else:
                step = Step(0.0, coefficients.decodes(3, 90) * pace.decodes, 0, 0, 3, 90)
            if found_in:  # until now
                found_in.append(found_in[-1]._replace(began=pace.at - found_in[-1].seconds))
            found_in.append(step._replace(began=pace.at))
        told[name] = tuple(found_in)
    key = Key("1p1d", "chat", 2.0, 0, 0)
    run = Measured(key, default_warmup(drawn.span), real.end, real.records, steps=told)
    found = as_measured(run, plan, costs)
    assert found is not None
    assert [r.ttft for r in found.records] == pytest.approx([r.ttft for r in real.records])
    assert [r.tpot for r in found.records] == pytest.approx([r.tpot for r in real.records])
    blind = imagine(plan, drawn, costs)
    assert max(r.ttft or 0.0 for r in blind.records) < 0.7 * max(r.ttft or 0.0 for r in real.records)


def test_a_step_of_stages_took_all_of_them(tmp_path: Path) -> None:
    costs = load_costs(write_costs(tmp_path / "costs.json"))
    one, two = costs.latency(1, 1), costs.latency(1, 2)
    for step in (Step(0, 1, 64, 4096, 0, 0), Step(0, 1, 0, 0, 5, 400), Step(0, 1, 64, 4096, 5, 400)):
        assert expected(two, step) == pytest.approx(2 * two.share * expected(one, step))


def test_the_clocks_know_its_own_from_others() -> None:
    before = others.look(os.getsid(0))
    if before is None:
        pytest.skip("this system tells no processor times")
    total = sum(range(3_000_000))
    after = others.look(os.getsid(0))
    assert total
    assert after is not None
    assert after.ours > before.ours
    assert set(others.between(before, after)) == {"others", "stolen"}
    assert others.look(None) is None
    assert others.between(None, after) == {}
