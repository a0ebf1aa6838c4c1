"""The simulator against real A100 runs, with the figures of docs/accuracy.md: one definition computes both."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from experiments.accuracy import score, variants
from experiments.accuracy.page import MAX_PADDING
from experiments.accuracy.runs import real_runs
from experiments.accuracy.score import Measured, Score, mean_and_worst
from experiments.accuracy.spans import Spans

RUNS = (
    "distserve-c21d11-300-3",
    "distserve-c21d11-300-6",
    "distserve-c21d11-300-9",
    "distserve-c21d11-450-4.5",
    "distserve-c21d11-900-9",
    "distserve-c21d12-400-4",
    "distserve-c21d12-800-8",
    "vllm-100-1",
    "vllm-200-2",
    "vllm-300-3",
)


@cache
def scored(name: str) -> Score:
    return score.score(real_runs()[name])


def test_all_runs_are_carried_whole() -> None:
    runs = real_runs()
    assert sorted(runs) == sorted(RUNS)
    for name, run in runs.items():
        requests, rate = (float(number) for number in name.split("-")[-2:])
        assert len(run.records) == requests
        assert run.rate == rate
        assert len(run.records) / run.workload().span == pytest.approx(rate, rel=0.001)


@pytest.mark.parametrize("name", RUNS)
def test_real_attainment_is_what_the_table_of_upstream_says(name: str) -> None:
    """The logs and upstream's figures are of the same runs (upstream counts an answer of one token as a TPOT of 0)."""
    real, table = Measured.of(real_runs()[name].records), score.published("real")[name]
    assert real.attainment == pytest.approx(table.attainment, abs=1e-5)
    assert real.ttft == pytest.approx(table.ttft, abs=1e-6)
    assert real.tpot == pytest.approx(table.tpot, rel=0.002)


@pytest.mark.parametrize("name", RUNS)
def test_every_request_is_answered(name: str) -> None:
    assert all(record.ok for record in scored(name).records)


@pytest.mark.parametrize("name", RUNS)
def test_attainment(name: str) -> None:
    assert mean_and_worst(scored(name).errors())[1] <= score.WORST_ERROR + 1e-9


def test_mean_attainment() -> None:
    assert mean_and_worst(error for name in RUNS for error in scored(name).errors())[0] <= score.MEAN_ERROR


@pytest.mark.parametrize("name", RUNS)
def test_medians(name: str) -> None:
    limit = score.VLLM_MEDIAN_ERROR if name.startswith("vllm") else score.MEDIAN_ERROR
    assert mean_and_worst(scored(name).median_errors())[1] <= limit


def test_closer_to_the_runs_than_upstreams_simulator() -> None:
    ours = mean_and_worst(error for name in RUNS for error in scored(name).errors())
    theirs = mean_and_worst(error for name in RUNS for error in scored(name).errors(scored(name).upstream))
    assert ours < theirs
    assert ours[1] < theirs[1]


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("vllm")])
def test_vllms_runs_with_the_host_that_served_them(name: str) -> None:
    """The shipped costs split the difference between two servers."""
    (habits,) = (habits for habits in variants.VLLMS if name in habits.runs)
    found = score.score(real_runs()[name], habits.costs())
    assert mean_and_worst(found.errors())[0] <= score.MEAN_ERROR
    assert mean_and_worst(found.median_errors())[1] <= score.MEDIAN_ERROR


@pytest.mark.parametrize(("name", "limited"), [("vllm-100-1", True), ("vllm-200-2", False), ("vllm-300-3", True)])
def test_the_logs_show_two_vllms(name: str, limited: bool) -> None:
    """Which prompts were computed together: one of the servers knew no limit on padding."""
    steps = Spans.real(real_runs()[name]).prompt_steps()
    assert sum(len(step.lengths) for step in steps) == len(real_runs()[name].records)
    assert (max(step.padding for step in steps) <= MAX_PADDING) is limited


def test_prompt_steps_of_a_log_by_hand() -> None:
    spans = Spans(
        *(np.array(values, float) for values in ([0, 0.1, 0.1], [0.5, 0.7, 0.701], [1, 1, 2], [9, 5, 8], [4, 4, 4]))
    )
    assert [step.lengths for step in spans.prompt_steps()] == [(9,), (5, 8)]
    assert [step.padding for step in spans.prompt_steps()] == [0, 3]
    assert spans.prompt_steps()[1].seconds == pytest.approx(0.2)
    assert spans.active(0.8) == 3
    assert spans.waiting(0.6) == pytest.approx((2, 0.5))
    assert spans.context(1.5) == pytest.approx(8 + 4 * (1.5 - 0.701) / (2 - 0.701), abs=1)
