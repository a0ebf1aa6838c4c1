"""Measurements as a file, one JSON object a line, so that what was measured is kept whatever happens next:

    {"format": 1, "model": .., "machine": .., "versions": ..}       the first line
    {"plan": NAME, "given": TOML, "served": TOML}                   a plan as given, and with the sizes of batches that
                                                                    both worlds then use
    {"chosen": [PLAN, WORKLOAD], "rates": [..], "slos": [[..], ..]} what the simulator chose, kept for the next run
    {"cell": [PLAN, WORKLOAD, RATE, SEED, REPEAT], ...}             a run: its requests column by column, and what the
                                                                    client and the server said of it

Knows no server and no simulator. Times in seconds since the run's first arrival.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from distserve.errors import UsageError
from distserve.metrics import OK, SLO, Record
from distserve.plan import Plan
from distserve.traces import Arrival
from distserve.validate.steps import Steps, from_columns, to_columns
from distserve.workload import Workload

FORMAT = 1
CALM = 0.1  # cores that other programs may use meanwhile
_DIGITS = 6  # microseconds


class Key(NamedTuple):
    """Which cell, and which of its runs. Runs that differ in `repeat` alone offer the same requests."""

    plan: str
    workload: str
    rate: float
    seed: int
    repeat: int

    def __str__(self) -> str:
        return f"{self.plan}, {self.workload} at {self.rate:g}/s"


@dataclass(frozen=True)
class Measured:
    """One run."""

    key: Key
    warmup: float
    end: float
    records: tuple[Record, ...]  # in order of arrival
    client: Mapping[str, float] = field(
        default_factory=dict
    )  # cpu (share of a core), late_p99, lag_p99 (s), sent_share;
    # others, stolen: cores that other programs used meanwhile, and that the machine's host took; whatever else whoever
    # measured keeps of it
    bottleneck: str = ""  # how the client spoiled the run; "": it did not
    server: Mapping[str, float] = field(default_factory=dict)  # by how much its metrics grew
    warnings: tuple[str, ...] = ()
    steps: Steps = field(default_factory=dict)  # of the server's instances, where it told

    @property
    def disturbed(self) -> float:
        """Cores that neither the server nor the client had, where that is more than a quiet machine's; else 0."""
        found = self.client.get("others", 0.0) + self.client.get("stolen", 0.0)
        return found if found > CALM else 0.0

    @property
    def spoiled(self) -> str:
        """Why it says little of the server, in a clause; "": nothing speaks against it."""
        if self.bottleneck:
            return "client too slow"
        return f"others used {self.disturbed:.0%} of a core" if self.disturbed else ""

    def workload(self) -> Workload:
        """What was offered, to be replayed."""
        arrivals = (Arrival(r.arrival, r.prompt_tokens, r.output_tokens, r.app) for r in self.records)
        return Workload(self.key.workload, tuple(arrivals), timed=True)

    def to_dict(self) -> dict[str, Any]:
        records = self.records
        return {
            "cell": list(self.key),
            "warmup": round(self.warmup, _DIGITS),
            "end": round(self.end, _DIGITS),
            "arrival": [round(r.arrival, _DIGITS) for r in records],
            "prompt_tokens": [r.prompt_tokens for r in records],
            "output_tokens": [r.output_tokens for r in records],
            "ttft": [_rounded(r.ttft) for r in records],
            "tpot": [_rounded(r.tpot) for r in records],
            "failed": {str(i): r.status for i, r in enumerate(records) if not r.ok},
            "client": {name: round(value, 5) for name, value in self.client.items()},
            "bottleneck": self.bottleneck,
            "server": {name: round(value, _DIGITS) for name, value in self.server.items()},
            "warnings": list(self.warnings),
            "steps": {name: to_columns(steps) for name, steps in self.steps.items()},
        }

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Measured:
        """Raises `KeyError`, `TypeError` or `ValueError` where something is missing or wrong."""
        plan, workload, rate, seed, repeat = line["cell"]
        failed = line["failed"]
        columns = (line[name] for name in ("arrival", "prompt_tokens", "output_tokens", "ttft", "tpot"))
        records = tuple(
            Record(arrival, prompt, output, ttft, tpot, failed.get(str(i), OK))
            for i, (arrival, prompt, output, ttft, tpot) in enumerate(zip(*columns, strict=True))
        )
        key = Key(str(plan), str(workload), float(rate), int(seed), int(repeat))
        return cls(
            key, float(line["warmup"]), float(line["end"]), records, line["client"], line["bottleneck"], line["server"],
            tuple(line["warnings"]), {name: from_columns(columns) for name, columns in line.get("steps", {}).items()},
        )  # fmt: skip


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)


@dataclass(frozen=True)
class Chosen:
    """By the simulator, for a plan and a workload."""

    rates: tuple[float, ...]
    slos: tuple[SLO, ...]


@dataclass
class Recording:
    """All of a file; `path` None: kept in memory alone."""

    path: Path | None
    model: str
    machine: str  # its fingerprint
    versions: str = ""
    given: dict[str, Plan] = field(default_factory=dict)
    served: dict[str, Plan] = field(default_factory=dict)
    chosen: dict[tuple[str, str], Chosen] = field(default_factory=dict)
    runs: dict[Key, Measured] = field(default_factory=dict)

    def begin(self) -> None:
        """The first line, where there is no file yet."""
        if self.path is not None and not self.path.exists():
            self._write({"format": FORMAT, "model": self.model, "machine": self.machine, "versions": self.versions})

    def add_plan(self, name: str, given: Plan, served: Plan) -> None:
        self.given[name], self.served[name] = given, served
        self._write({"plan": name, "given": given.to_toml(), "served": served.to_toml()})

    def add_chosen(self, plan: str, workload: str, chosen: Chosen) -> None:
        self.chosen[plan, workload] = chosen
        slos = [[slo.ttft, slo.tpot] for slo in chosen.slos]
        self._write({"chosen": [plan, workload], "rates": list(chosen.rates), "slos": slos})

    def slos_of(self, workload: str) -> tuple[SLO, ...]:
        """That were chosen for it, whatever served it; (): none."""
        return next((chosen.slos for (_, name), chosen in self.chosen.items() if name == workload), ())

    def add(self, measured: Measured) -> Measured:
        """Returns it as the file has it."""
        line = measured.to_dict()
        self._write(line)
        self.runs[measured.key] = found = Measured.from_dict(line)
        return found

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror}") from None


def versions() -> str:
    """Of the software that computes here."""
    return f"distserve {version('distserve')}, torch {version('torch')}"


def read(path: Path) -> Recording:
    """A file of measurements, gzipped where its name ends in .gz. Raises `UsageError` that names the line."""
    try:
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the measurements {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text: name a file that validate --record wrote") from None
    lines = text.splitlines()
    whole = lines if text.endswith("\n") else lines[:-1]  # a line that was being written when something ended it
    recording: Recording | None = None
    for number, line in enumerate(whole, 1):
        try:
            found = json.loads(line)
            if recording is None:
                recording = _head(path, found)
            else:
                _take(recording, found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"{path}, line {number} is no measurement ({type(error).__name__}: {error}): name a file that validate "
                "--record wrote, or take that line out"
            ) from None
    if recording is None:
        raise UsageError(f"{path} is empty: name a file that validate --record wrote")
    return recording


def _head(path: Path, line: Mapping[str, Any]) -> Recording:
    if line["format"] != FORMAT:
        raise ValueError(f"format {line['format']}, not {FORMAT}")
    return Recording(path, str(line["model"]), str(line["machine"]), str(line["versions"]))


def _take(recording: Recording, line: Mapping[str, Any]) -> None:
    if "cell" in line:
        measured = Measured.from_dict(line)
        recording.runs[measured.key] = measured
    elif "chosen" in line:
        plan, workload = line["chosen"]
        slos = tuple(SLO(ttft, tpot) for ttft, tpot in line["slos"])
        recording.chosen[plan, workload] = Chosen(tuple(map(float, line["rates"])), slos)
    else:
        name = line["plan"]
        recording.given[name] = Plan.from_toml(line["given"], f"plan {name}")
        recording.served[name] = Plan.from_toml(line["served"], f"plan {name}")
