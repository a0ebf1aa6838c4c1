"""Predicted beside measured: a twin with the very same costs errs nowhere, and one with others by what is known."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.validate.support import load_costs, recording, write_costs

from distserve.costs.profile import ProfileCosts
from distserve.metrics import SLO
from distserve.validate.compare import Capacity, Comparison, compare, crossing, falling
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


@pytest.mark.parametrize(
    ("curve", "rate"),
    [
        ([(1, 1.0), (2, 0.8)], 1.5),
        ([(1, 1.0), (2, 0.95), (3, 0.85), (4, 0.85)], 2.5),
        ([(1, 1.0), (2, 0.88), (3, 0.94), (4, 0.71)], 3.05),  # 0.91 at both in the middle
        ([(1, 0.88), (2, 0.96), (3, 0.8)], 2 + 0.02 / 0.12),  # 0.92 at both
        ([(1, 0.9), (2, 0.0)], 1.0),
        ([(1, 1.0), (2, 0.91)], None),
        ([(1, 0.5), (2, 0.4)], None),
    ],
)
def test_where_attainment_falls_below_the_goal(curve: list[tuple[float, float]], rate: float | None) -> None:
    found = crossing(curve, 0.9)
    assert found == (None if rate is None else pytest.approx(rate))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_a_curve_that_is_made_to_fall_falls_and_keeps_its_mean(shares: list[float]) -> None:
    made = [share for _, share in falling(list(enumerate(shares, 1)))]
    assert all(high >= low - 1e-12 for high, low in pairwise(made))
    assert sum(made) == pytest.approx(sum(shares))
    if all(high >= low for high, low in pairwise(shares)):
        assert made == shares


def test_beyond_the_rates_an_error_is_told_as_far_as_it_is_known() -> None:
    def of(measured: float | None, predicted: float | None, ends: tuple[float, float]) -> Capacity:
        return Capacity("1p1d", "chat", SLO(1.0, 0.1), measured, predicted, (1.0, 2.0, 3.0), ends)

    assert of(2.0, 2.5, (2.0, 2.5)).error == pytest.approx(0.25)
    assert of(2.0, None, (2.0, 3.0)).error == pytest.approx(0.5)
    assert not of(2.0, None, (2.0, 3.0)).exact
    assert of(None, None, (3.0, 1.0)).error is None
