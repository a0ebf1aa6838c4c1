"""What is asked of the contenders: lengths as in the paper's three applications (section 6.1, table 1), scaled to a
model of 135 million parameters on a core, and targets of the same proportions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from distserve.metrics import SLO
from distserve.validate.grid import Lengths, rounded

CONTEXT = 8192  # tokens of the demo model
SCALES = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # of the targets: Figure 9
GOAL = 0.9
DURATION = 30.0  # seconds of arrivals of a cell
RATES = 5


@dataclass(frozen=True)
class Case:
    """One application."""

    name: str
    workload: str  # as `distserve validate` names it
    slo: SLO  # at scale 1

    @cached_property
    def lengths(self) -> Lengths:
        return Lengths.load(self.workload).clipped(CONTEXT)

    def scaled(self, scale: float) -> SLO:
        ttft, tpot = self.slo.ttft, self.slo.tpot
        assert ttft is not None
        assert tpot is not None
        return SLO(rounded(ttft * scale), rounded(tpot * scale))


# Chat wants both at once, code completion its first token soon, a summary its words at a reader's pace: the proportions
# of the paper's table 1, around what this machine's idle core takes (docs/measurements.md).
CASES = (
    Case("chat", "sharegpt:0.25", SLO(0.3, 0.03)),
    Case("code completion", "humaneval", SLO(0.15, 0.04)),
    Case("summarisation", "longbench:0.5", SLO(1.5, 0.03)),
)
