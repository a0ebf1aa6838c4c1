"""The pace of a machine over time, from how long known steps took."""

from __future__ import annotations

import pytest

from distserve.profiler.phases import Findings
from distserve.profiler.series import Series
from distserve.profiler.survey import Survey, Visit
from distserve.profiler.weather import WINDOW, watched


async def nothing(key: object) -> list[float]:
    return [1.0]


def findings(prompts: list[tuple[float, float]], decodes: list[tuple[float, float]]) -> Findings:
    """Of visits (when, how many times as long as typical)."""
    surveys = Survey(nothing), Survey(nothing), Survey(nothing)
    for survey, visits in zip(surveys, (prompts, decodes), strict=False):
        survey.series["a"] = Series([0.5])
        survey.visits += [Visit(at, "a", 0.5 * times) for at, times in visits]
    return Findings(surveys=surveys)  # type: ignore[arg-type]


def test_a_steady_machine_has_no_weather() -> None:
    assert watched(Findings()) is None
    assert watched(findings([(0.0, 1.0), (1.0, 1.02)], [(0.5, 1.01)])) is None


def test_each_window_has_the_pace_of_its_visits_and_keeps_the_other_phases() -> None:
    found = watched(findings([(100.0, 1.0), (100.1, 2.0), (101.1, 3.0)], [(100.6, 1.2), (101.9, 1.0)]))
    assert found is not None
    mean = 1.1  # of decode steps, until one is seen
    assert found["paces"] == [
        pytest.approx([0.0, 1.5, mean]),
        pytest.approx([WINDOW, 1.5, 1.2]),
        pytest.approx([2 * WINDOW, 3.0, 1.2]),
        pytest.approx([3 * WINDOW, 3.0, 1.0]),
    ]
    assert found["span"] == 4 * WINDOW
