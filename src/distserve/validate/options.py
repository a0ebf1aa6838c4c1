"""What `distserve validate` was told, checked where it is born. Knows no server and no command line parser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from distserve.errors import UsageError
from distserve.metrics import SLO

DEMO_MODEL = "smollm2-135m-instruct"
WORKLOADS = ("sharegpt:0.25", "humaneval:0.5,1.5", "longbench:0.5,0.15")  # chat; short to long; long to short
RATES = 5  # a plan and workload, where the simulator chooses them


@dataclass(frozen=True, slots=True)
class ValidateOptions:
    """A grid of cells, and what to compare it with. Raises `UsageError` naming the option, its value and the cure."""

    costs: str | None = None
    plans: tuple[str, ...] = ()  # names of `grid.PLANS` or files; (): all of these names
    workloads: tuple[str, ...] = ()  # NAME|FILE[:PROMPT[,ANSWER]]; (): WORKLOADS
    rates: tuple[float, ...] = ()  # requests/s; (): around the knee
    slos: tuple[SLO, ...] = ()  # (): from what an idle system takes
    goal: float = 0.9
    duration: float = 60.0  # seconds of arrivals of a cell
    requests: int | None = None  # of a cell, in place of `duration`
    repeats: int = 1
    seed: int = 0
    model: str | None = None  # None: the plan's, else DEMO_MODEL
    url: str | None = None  # of a server that runs; None: one is started for each plan
    record: Path | None = None
    source: Path | None = None  # --from
    time: float = math.inf  # seconds of measuring
    within: float | None = None  # largest mean error of attainment
    json_out: str | None = None
    requests_out: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        if self.costs is None:
            raise UsageError("--costs is missing: measure this machine first (distserve profile -o costs.json)")
        if self.source is not None and (self.record is not None or self.url is not None):
            raise UsageError("--from compares what was measured before: leave --record and --url out")
        if self.record is not None and self.record.suffix == ".gz":
            raise UsageError(f"--record {self.record}: lines are added to it run by run; pack it when it is complete")
        if self.url is not None and len(self.plans) != 1:
            raise UsageError("--url is one server: say with one --plan FILE which instances it runs")
        for rate in self.rates:
            if not (math.isfinite(rate) and rate > 0):
                raise UsageError(f"the rate {rate:g} must be above 0 requests a second")
        for name, number in (("--requests", self.requests), ("--repeats", self.repeats)):
            if number is not None and number < 1:
                raise UsageError(f"{name} {number} is too small: at least 1")
        for name, seconds in (("--duration", self.duration), ("--time", self.time)):
            if not seconds > 0:
                raise UsageError(f"{name} {seconds:g} must be above 0 seconds")
        if not 0 < self.goal < 1:
            raise UsageError(f"--goal {self.goal:g} must be a share between 0 and 1, such as 0.9")
        if self.within is not None and not 0 <= self.within <= 1:
            raise UsageError(f"--within {self.within:g} must be a share, such as 0.02")
