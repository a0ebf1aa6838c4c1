"""Where an error comes from: a machine that was slower than its costs is told from a twin that queues wrongly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.validate.support import MODEL, load_costs, run_of, write_costs

from distserve.plan import Role
from distserve.sim.simulate import imagine
from distserve.validate import grid, weather
from distserve.validate.compare import judged, lived
from distserve.validate.explain import STEP, Slower, as_measured, steps
from distserve.validate.record import Key, Measured
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
    found = steps(run, imagine(plan, drawn, costs))
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


def test_slower_costs_are_the_same_but_for_their_steps(tmp_path: Path) -> None:
    costs = load_costs(write_costs(tmp_path / "costs.json"))
    slower = Slower(costs, {"prefill": 2.0, "decode": 3.0})
    known, found = costs.latency(1, 1).coefficients, slower.latency(1, 1).coefficients
    assert found.prompts(100, 10_000) == pytest.approx(2 * known.prompts(100, 10_000))
    assert found.decodes(8, 900) == pytest.approx(3 * known.decodes(8, 900))
    assert slower.kv_blocks(1, 1) == costs.kv_blocks(1, 1)
    assert slower.degrees() == costs.degrees()
    assert slower.notes(1, 1, 1) == costs.notes(1, 1, 1)
    assert slower.assumed_cluster(2) == costs.assumed_cluster(2)


def test_the_weather_knows_its_own_from_others() -> None:
    before = weather.look(os.getsid(0))
    if before is None:
        pytest.skip("this system tells no processor times")
    total = sum(range(3_000_000))
    after = weather.look(os.getsid(0))
    assert total
    assert after is not None
    assert after.ours > before.ours
    assert set(weather.between(before, after)) == {"others", "stolen"}
    assert weather.look(None) is None
    assert weather.between(None, after) == {}
