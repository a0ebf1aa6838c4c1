"""Whether a run shows a steady state or a queue on its way up, from what became of its requests. Knows no world.

At a rate beyond what a system can take, queues grow without end, and the attainment of a run is whatever its length
makes it. Three signs, each asked with the noise of neighbours that fare alike (batch means, as in `metrics`):

    grows   TTFT or TPOT take longer and longer: from the first to the second to the last third
    falls   the second half of the requests meets its targets clearly less often than the first
    short   the run lasted only a few times as long as a request stays: what it shows is a beginning
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance

from distserve.metrics import SLO, Record, Targets, proportion_interval

ENOUGH = 3.0  # times that a request stays; a run that lasts less long shows a beginning
_LEAST = 30  # requests in each part that is compared
_CLEARLY = 1.25  # the last third's mean over the first's


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
    """Whether the last third is larger than the middle one, which is larger than the first, and by more than chance."""
    third = len(values) // 3
    if third < _LEAST:
        return False
    parts = [values[i * third : (i + 1) * third] for i in range(3)]
    first, middle, last = map(fmean, parts)
    if not first < middle < last or last < _CLEARLY * first:
        return False
    return last - first > 2 * math.sqrt(_noise(parts[0]) + _noise(parts[2]))


def _noise(values: Sequence[float]) -> float:
    """The variance of the mean, of values whose neighbours resemble each other."""
    size = max(1, math.isqrt(len(values)))
    batches = [fmean(values[i : i + size]) for i in range(0, len(values) - size + 1, size)]
    return variance(batches) / len(batches)


def falls(met: Sequence[bool]) -> bool:
    """Whether the second half meets its targets clearly less often than the first."""
    half = len(met) // 2
    if half < _LEAST:
        return False
    return proportion_interval(met[half:])[1] < proportion_interval(met[:half])[0]
