"""Whether a run shows a steady state or a queue on its way up, from what became of its requests. Knows no world.

At a rate beyond what a system can take, queues grow without end, and the attainment of a run is whatever its length
makes it. Three signs, each asked with the noise of neighbours that fare alike (batch means, as in `metrics`):

    grows   TTFT or TPOT take longer and longer
    falls   the second half of the requests meets its targets clearly less often than the first
    short   the run lasted only a few times as long as a request stays: what it shows is a beginning
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, linear_regression

from distserve.metrics import SLO, Record, Targets, proportion_interval

ENOUGH = 3.0  # times that a request stays; a run that lasts less long shows a beginning
_LEAST = 30  # requests in each part that is compared
_CLEARLY = 1.25  # the last third's mean over the first's
_BATCHES = 10
_SURELY = 2.896  # Student's t, one-sided at 1 %, for ten means about a line (8 degrees of freedom)


def growing(records: Sequence[Record], judge: SLO | Targets) -> str:
    """What got worse and worse, as a clause; "" where nothing did. `records` count, and are in order of arrival."""
    for name in ("ttft", "tpot"):
        values = [value for record in records if (value := getattr(record, name)) is not None]
        if grows(values):
            third = len(values) // 3
            return (
                f"{name.upper()} grows from {fmean(values[:third]):.3g} s in the first third of the run to "
                f"{fmean(values[-third:]):.3g} s in the last"
            )
    return falling([judge.met(record) for record in records])


def falling(met: Sequence[bool]) -> str:
    """That attainment `falls`, as a clause; "" where it does not."""
    if not falls(met):
        return ""
    half = len(met) // 2
    first, second = (f"{sum(part) / len(part):.0%}" for part in (met[:half], met[half:]))
    return f"attainment falls from {first} in the first half of the run to {second} in the second"


def short(records: Sequence[Record]) -> str:
    """That the run was too short to settle, as a clause; "" where it was not."""
    span = records[-1].arrival - records[0].arrival if records else 0.0
    stays = residence(records)
    if stays is None or not span or span >= ENOUGH * stays:
        return ""
    return f"the requests that count arrived within {span:.3g} s, and one stays {stays:.3g} s"


def residence(records: Sequence[Record]) -> float | None:
    """Seconds that the mean answered request stays; None: none was answered."""
    stays = [
        record.ttft + (record.tpot or 0.0) * max(0, record.output_tokens - 1)
        for record in records
        if record.ok and record.ttft is not None
    ]
    return fmean(stays) if stays else None


def grows(values: Sequence[float]) -> bool:
    """Whether values rise from the first third to the last by a quarter, and more steadily than chance has them rise.

    Chance is what the means of ten consecutive batches stray by from their own straight line: neighbours in a queue
    fare alike, and near saturation hundreds of them do, so that thirds differ widely where nothing grows. The slope of
    that line is held against it (least squares on batch means, as in `metrics`).
    """
    third = len(values) // 3
    if third < _LEAST or fmean(values[-third:]) < _CLEARLY * fmean(values[:third]):
        return False
    size = len(values) // _BATCHES
    means = [fmean(values[i * size : (i + 1) * size]) for i in range(_BATCHES)]
    slope, start = linear_regression(range(_BATCHES), means)
    strays = sum((mean - start - slope * i) ** 2 for i, mean in enumerate(means))
    spread = (_BATCHES**3 - _BATCHES) / 12  # of 0, 1, 2, ...: the sum of squares about their mean
    return slope > _SURELY * math.sqrt(strays / (_BATCHES - 2) / spread)


def falls(met: Sequence[bool]) -> bool:
    """Whether the second half meets its targets clearly less often than the first."""
    half = len(met) // 2
    if half < _LEAST:
        return False
    return proportion_interval(met[half:])[1] < proportion_interval(met[:half])[0]
