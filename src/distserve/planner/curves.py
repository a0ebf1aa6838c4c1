"""Attainment against rate and against SLO scale, of a few deployments. Knows questions and answers, no drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distserve.planner.ask import Question, ask
from distserve.planner.goodput import ROUGH
from distserve.planner.jobs import Jobs

RATES = (0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)  # of the best goodput
SCALES = (0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0)  # of the targets


@dataclass(frozen=True, slots=True)
class Curve:
    """One deployment's."""

    name: str
    devices: int
    by_rate: tuple[tuple[float, float], ...]  # (requests/s per device, attainment)
    by_scale: tuple[tuple[float, float], ...]  # (factor of the targets, attainment)


def curves(
    jobs: Jobs, subjects: Sequence[tuple[str, int, int, Question]], per_device: float, rate: float
) -> list[Curve]:
    """`subjects`: (name, devices, copies, a question about one copy). Rates are around the goodput of the best,
    `per_device`; scales are at `rate`."""
    questions = []
    for _, devices, copies, question in subjects:
        base = replace(question, length=ROUGH, early=False)
        questions += [replace(base, rate=per_device * share * devices / copies) for share in RATES]
        questions += [replace(base, rate=rate / copies, scale=scale) for scale in SCALES]
    verdicts = iter(jobs.map(ask, questions))
    found = []
    for name, devices, _, _ in subjects:
        by_rate = tuple((per_device * share, next(verdicts).attainment.joint) for share in RATES)
        by_scale = tuple((scale, next(verdicts).attainment.joint) for scale in SCALES)
        found.append(Curve(name, devices, by_rate, by_scale))
    return found
