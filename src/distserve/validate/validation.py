"""What a validation knows while it runs: the grid, what was measured of it, and the costs that predict it. Measures
nothing and prints nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from distserve.costs.base import Costs
from distserve.errors import UsageError
from distserve.metrics import SLO
from distserve.validate.compare import Comparison, compare
from distserve.validate.grid import Lengths
from distserve.validate.options import ValidateOptions
from distserve.validate.record import Key, Recording


@dataclass
class Validation:
    """One command."""

    options: ValidateOptions
    costs: Costs
    recording: Recording
    cells: list[Key] = field(default_factory=list)  # of the grid; of --from, what the file has
    lengths: dict[str, Lengths] = field(default_factory=dict)
    fresh: set[Key] = field(default_factory=set)  # measured by this command
    interrupted: bool = False
    out_of_time: bool = False
    failures: list[str] = field(default_factory=list)  # servers that did not start or died

    @property
    def missing(self) -> int:
        """Runs of the grid that nobody measured."""
        return sum(key not in self.recording.runs for key in self.cells)

    @property
    def left(self) -> list[Key]:
        """To be measured: not done yet, or when the machine had other work: those are measured again."""
        runs = self.recording.runs
        return [key for key in self.cells if key not in self.fresh and (key not in runs or runs[key].disturbed)]

    def slos(self, plan: str, workload: str) -> Sequence[SLO]:
        chosen = self.recording.chosen.get((plan, workload))
        found = self.options.slos or (chosen.slos if chosen is not None else ())
        if not found:
            raise UsageError(f"nothing says which targets {workload} has: give --slo ttft=..,tpot=.. (seconds)")
        return found

    def compare(self) -> Comparison:
        wanted = set(self.cells)
        runs = [run for key, run in self.recording.runs.items() if key in wanted]
        return compare(runs, self.recording.served, self.costs, self.slos, self.options.goal)
