"""Predicted beside measured: a twin with the very same costs errs nowhere, and one with others by what is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.validate.support import costs_table, load_costs, recording, write_costs

from distserve.costs.profile import ProfileCosts
from distserve.metrics import SLO
from distserve.validate import grid
from distserve.validate.compare import MOMENTS, Comparison, at_moments, compare, one_after_another
from distserve.validate.record import Measured, Recording

RATES = (1.0, 4.0, 8.0)
TARGETS = SLO(0.3, 0.06)


@pytest.fixture
def costs(tmp_path: Path) -> ProfileCosts:
    return load_costs(write_costs(tmp_path / "costs.json"))


def compared(found: Recording, costs: ProfileCosts, *slos: SLO) -> Comparison:
    return compare(found.runs.values(), found.served, costs, lambda plan, workload: slos or (TARGETS,), 0.9)


def test_the_same_costs_err_nowhere(costs: ProfileCosts) -> None:
    found = compared(recording(None, costs, RATES), costs)
    assert len(found.cells) == 6
    assert len({cell.attainment for cell in found.cells}) > 2  # the rates reach beyond the knee
    for verdict in found.verdicts:
        assert verdict.met
        assert verdict.mean == pytest.approx(0, abs=1e-4)  # arrivals are kept to the microsecond
    assert not found.as_it_was  # nobody recorded steps
    assert [each.error for each in found.capacities if each.error is not None] == pytest.approx([0, 0], abs=1e-3)


def test_costs_that_are_a_tenth_too_high_predict_a_tenth_too_much(costs: ProfileCosts, tmp_path: Path) -> None:
    slower = load_costs(write_costs(tmp_path / "slower.json", 1.1))
    found = compared(recording(None, costs, (0.2,)), slower)
    for cell in found.cells:
        assert cell.latency_error("tpot", "p50") == pytest.approx(0.1, abs=0.02)
        assert cell.latency_error("ttft", "p50") == pytest.approx(0.1, abs=0.02)
    verdicts = {verdict.what: verdict for verdict in found.verdicts}
    assert verdicts["TPOT p50"].met is False
    assert verdicts["TPOT p50"].bias == pytest.approx(0.1, abs=0.02)


def test_each_slo_judges_every_run_and_latencies_count_once(costs: ProfileCosts) -> None:
    found = compared(recording(None, costs, RATES), costs, TARGETS, SLO(0.6, 0.1))
    verdicts = {verdict.what: verdict for verdict in found.verdicts}
    assert verdicts["attainment"].cells == 12
    assert verdicts["TTFT p90"].cells == 6
    loose = [cell for cell in found.cells if cell.slo != TARGETS]
    tight = [cell for cell in found.cells if cell.slo == TARGETS]
    assert all(a.attainment >= b.attainment for a, b in zip(loose, tight, strict=True))


def test_repeats_show_the_noise_and_their_mean_is_what_was_measured(costs: ProfileCosts, tmp_path: Path) -> None:
    found = recording(None, costs, (0.2,))
    slower = load_costs(write_costs(tmp_path / "slower.json", 1.2))
    again = recording(None, slower, (0.2,))
    runs = [*found.runs.values()]
    for run in again.runs.values():
        key = run.key._replace(repeat=1)
        runs.append(Measured(key, run.warmup, run.end, run.records))
    seen = compare(runs, found.served, costs, lambda plan, workload: (TARGETS,), 0.9)
    for cell in seen.cells:
        one, two = (report.attainment.joint for report in cell.measured)
        assert cell.noise == pytest.approx(abs(one - two))
        assert cell.attainment == pytest.approx((one + two) / 2)
        assert cell.latency_noise("tpot", "p50") == pytest.approx(0.2 / 1.1, abs=0.05)
    assert seen.verdicts[0].noise is not None


def test_a_run_that_was_spoiled_counts_in_no_error(costs: ProfileCosts) -> None:
    found = recording(None, costs, (1.0,))
    spoilt: list[tuple[dict[str, float], str]] = [({}, "too slow"), ({"others": 0.3, "stolen": 0.0}, "")]
    runs = [
        Measured(r.key, r.warmup, r.end, r.records, client, why)
        for r, (client, why) in zip(found.runs.values(), spoilt, strict=True)
    ]
    assert [run.spoiled for run in runs] == ["client too slow", "others used 30% of a core"]
    seen = compare(runs, found.served, costs, lambda plan, workload: (TARGETS,), 0.9)
    assert len(seen.cells) == 2
    assert all(verdict.mean is None and verdict.met is None for verdict in seen.verdicts)
    assert seen.attainment_error == float("inf")


def test_nobody_knows_which_moment_of_the_weather_a_run_meets(costs: ProfileCosts, tmp_path: Path) -> None:
    """Slow for one half of the time: what is predicted is neither half but both."""
    run = next(iter(recording(None, costs, (1.0,)).runs.values()))
    span = 12 * run.end
    halves = {"span": span, "paces": [[0.0, 1.0, 1.0], [span / 2, 2.0, 2.0]]}
    (tmp_path / "halves.json").write_text(json.dumps(costs_table() | {"weather": halves}))
    changing, slow = load_costs(tmp_path / "halves.json"), load_costs(write_costs(tmp_path / "slow.json", 2.0))
    plan = grid.PLANS["2c-whole"]
    found = at_moments(plan, run.workload(), changing)
    assert len(found) == MOMENTS
    assert len(at_moments(plan, run.workload(), costs)) == 1
    quick, late = (at_moments(plan, run.workload(), each)[0].records for each in (costs, slow))
    firsts = [each.records[-1].ttft for each in found]
    assert {quick[-1].ttft, late[-1].ttft} <= set(firsts)
    records, end = one_after_another(found, run.warmup)
    assert len(records) == sum(
        r.arrival >= run.warmup + each.records[0].arrival for each in found for r in each.records
    )
    assert [r.arrival for r in records] == sorted(r.arrival for r in records)
    assert records[-1].arrival < end
    assert end == pytest.approx(sum(each.end - each.records[0].arrival - run.warmup for each in found))
