"""What was measured of one thing, time and again, and whether it can be trusted yet. Knows no machine and no step.

A machine that others use slows down now for a moment, now for seconds; nothing makes it faster than it is. So the
values near the fastest ones tell what a step takes, and the others tell of the machine's guests: they are counted, not
averaged.

    values --typical--> those near the lower quartile --median--> seconds, with a standard error
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from statistics import median

ENOUGH = 4  # values, unless somebody doubts them
NEAR = 1.15  # times the lower quartile: values above are guests'
STEADY = 0.025  # standard error of the median, relative, at which no more is needed


@dataclass(slots=True)
class Series:
    """Seconds of the same work at different times."""

    values: list[float] = field(default_factory=list)
    wanted: int = ENOUGH  # values before anything is believed

    @property
    def typical(self) -> list[float]:
        """Those that tell of the work, in ascending order."""
        ordered = sorted(self.values)
        quartile = ordered[(len(ordered) - 1) // 4]
        return [value for value in ordered if value <= NEAR * quartile]

    @property
    def seconds(self) -> float:
        return median(self.typical)

    @property
    def outliers(self) -> int:
        return len(self.values) - len(self.typical)

    @property
    def error(self) -> float:
        """Of `seconds`, relative: the standard error of a median, from the median deviation (1.253 * 1.483 = 1.858)."""
        typical, middle = self.typical, self.seconds
        deviation = median(abs(value - middle) for value in typical)
        return 1.858 * deviation / middle / sqrt(len(typical))

    @property
    def settled(self) -> bool:
        """Enough values, most of them near each other."""
        if len(self.values) < self.wanted or 2 * self.outliers > len(self.values):
            return False
        return self.error <= STEADY
