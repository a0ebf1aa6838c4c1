"""The real runs and how each is simulated. The one definition that the report and the tests share.

The logs name their plan: `distserve-c21d12-800-8` is a prefill instance of tp 2 and pp 1, a decode instance of tp 1 and
pp 2, 800 requests at 8 a second; `vllm-200-2` one colocated instance of tp 1, 200 requests at 2 a second.
"""

from __future__ import annotations

import csv
import gzip
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from distserve.costs.profile import Profile, ProfileCosts
from distserve.metrics import Record
from distserve.plan import InstanceSpec, Plan, Policy, Role
from distserve.sim.simulate import Imagination, imagine
from distserve.traces import Arrival
from distserve.workload import Workload

DATA = Path(__file__).parent.parent / "data"
MODEL = "facebook/opt-13b"
_NAME = re.compile(r"(?:vllm|distserve-c(?P<ptp>\d)(?P<ppp>\d)d(?P<dtp>\d)(?P<dpp>\d))-\d+-(?P<rate>[\d.]+)")


@dataclass(frozen=True)
class Run:
    """One real run; requests in order of arrival."""

    name: str
    records: tuple[Record, ...]  # as the client saw them
    latencies: tuple[float, ...]  # seconds from each arrival to the last token

    @property
    def of_vllm(self) -> bool:
        return self.name.startswith("vllm")

    @property
    def costs_name(self) -> str:
        return "a100-80g-vllm" if self.of_vllm else "a100-80g"

    @property
    def rate(self) -> float:
        return float(_match(self.name)["rate"])

    def costs(self) -> ProfileCosts:
        """The shipped costs, with every default of the engine that they name."""
        return Profile.load(self.costs_name).costs(MODEL)

    def plan(self) -> Plan:
        if self.of_vllm:
            return Plan((InstanceSpec(Role.COLOCATED, policy=Policy.PREFILL_FIRST),))
        found = _match(self.name)
        return Plan(
            (
                InstanceSpec(Role.PREFILL, tp=int(found["ptp"]), pp=int(found["ppp"])),
                InstanceSpec(Role.DECODE, tp=int(found["dtp"]), pp=int(found["dpp"])),
            )
        )

    def workload(self) -> Workload:
        """The same arrivals and lengths."""
        arrivals = tuple(Arrival(r.arrival, r.prompt_tokens, r.output_tokens) for r in self.records)
        return Workload(self.name, arrivals, timed=True)

    def simulate(self, costs: ProfileCosts | None = None, workload: Workload | None = None) -> Imagination:
        """`costs`: None: the shipped ones. `workload`: None: the run's own."""
        return imagine(self.plan(), workload or self.workload(), costs or self.costs())


def _match(name: str) -> re.Match[str]:
    found = _NAME.fullmatch(name)
    assert found, f"{name} names no plan"
    return found


@cache
def real_runs() -> dict[str, Run]:
    """All ten, by name."""
    rows = defaultdict(list)
    with gzip.open(DATA / "a100_runs.csv.gz", "rt", encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            rows[row["run"]].append(row)
    return {
        name: Run(name, tuple(map(_record, found)), tuple(float(row["latency_ms"]) / 1e3 for row in found))
        for name, found in rows.items()
    }


def _record(row: dict[str, str]) -> Record:
    output_tokens = int(row["output_len"])
    return Record(
        arrival=float(row["arrival_s"]),
        prompt_tokens=int(row["input_len"]),
        output_tokens=output_tokens,
        ttft=float(row["ttft_ms"]) / 1e3,
        tpot=float(row["tpot_ms"]) / 1e3 if output_tokens > 1 else None,
    )
