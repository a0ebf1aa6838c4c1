"""How steady the machine was while its steps were timed: from visits, each of which took as long as such a step
typically does or longer, to its pace over time. Knows no machine.

    visits --/ typical seconds--> how many times as long --means of windows--> paces, by phase
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from distserve.costs.base import Pace
from distserve.profiler.phases import Findings
from distserve.profiler.survey import Survey

WINDOW = 0.5  # seconds whose visits are taken together
STEADY = 1.03  # a machine whose steps take this at most, in the mean of every phase, has no weather


def watched(found: Findings) -> dict[str, Any] | None:
    """For a costs file; None: there is nothing to tell."""
    if found.surveys is None:
        return None
    prompts, decodes, _ = found.surveys
    slow = {"prompts": _slow(prompts), "decodes": _slow(decodes)}
    if not all(slow.values()) or all(fmean(times for _, times in each) <= STEADY for each in slow.values()):
        return None
    start = min(at for each in slow.values() for at, _ in each)
    span = max(at for each in slow.values() for at, _ in each) - start
    windows = {name: _windows([(at - start, times) for at, times in each]) for name, each in slow.items()}
    paces: list[Pace] = []
    latest = {name: fmean(times for _, times in each) for name, each in slow.items()}  # until something is known
    for number in range(int(span / WINDOW) + 1):
        latest |= {name: each[number] for name, each in windows.items() if number in each}
        pace = Pace(number * WINDOW, round(latest["prompts"], 3), round(latest["decodes"], 3))
        if not paces or pace[1:] != paces[-1][1:]:
            paces.append(pace)
    return {"span": (int(span / WINDOW) + 1) * WINDOW, "paces": [list(pace) for pace in paces]}


def _slow(survey: Survey[Any]) -> list[tuple[float, float]]:
    """(when, how many times as long as typical) of each visit."""
    return [(visit.at, visit.seconds / survey.series[visit.key].seconds) for visit in survey.visits]


def _windows(times: list[tuple[float, float]]) -> dict[int, float]:
    """The mean of each window that has any."""
    found: dict[int, list[float]] = {}
    for at, each in times:
        found.setdefault(int(at / WINDOW), []).append(each)
    return {number: fmean(values) for number, values in found.items()}
