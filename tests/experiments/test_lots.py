"""What weather alone does to a run, where the weather is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments.accuracy.lots import lots
from tests.validate.support import load_costs, recording, write_costs

from distserve.costs.profile import ProfileCosts
from distserve.metrics import SLO
from distserve.validate.record import Chosen, Recording
from distserve.validate.steps import Step

RATES = (1.0, 3.0, 6.0)


def told(costs: ProfileCosts, slowness: list[float]) -> Recording:
    """Runs whose steps of either kind took so many times what they cost, by rate."""
    found = recording(None, costs, RATES)
    coefficients = costs.latency(1, 1).coefficients
    for key, run in found.runs.items():
        times = slowness[RATES.index(key.rate)]
        steps = (
            Step(0.0, times * coefficients.prompts(64, 4096), 64, 4096, 0, 0),
            Step(1.0, times * coefficients.decodes(3, 90), 0, 0, 3, 90),
        )
        names = [replica.name for replica in found.served[key.plan].replicas()]
        found.runs[key] = replace(run, steps=dict.fromkeys(names, steps))
    for name in found.served:
        found.add_chosen(name, "sharegpt:0.25", Chosen(RATES, (SLO(0.3, 0.05),)))
    return found


def test_where_the_weather_is_always_the_same_everything_can_be_known(tmp_path: Path) -> None:
    costs = load_costs(write_costs(tmp_path / "costs.json"))
    found = lots(told(costs, [1.0, 1.0, 1.0]), costs)
    assert found is not None
    assert found.attainment == found.apart == 0.0
    assert max(found.latencies.values()) < 1e-4


def test_where_it_changes_from_run_to_run_nobody_can_know(tmp_path: Path) -> None:
    costs = load_costs(write_costs(tmp_path / "costs.json"))
    found = lots(told(costs, [1.0, 2.5, 1.2]), costs)
    assert found is not None
    assert found.apart > 0.1
    assert found.attainment > 0.05
    assert found.latencies["tpot", "p50"] > 0.1


def test_of_runs_that_tell_no_steps_nothing_is_said(tmp_path: Path) -> None:
    costs = load_costs(write_costs(tmp_path / "costs.json"))
    assert lots(recording(None, costs, RATES), costs) is None
