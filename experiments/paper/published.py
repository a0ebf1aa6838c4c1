"""The paper's numbers, as experiments/data/paper holds them. Knows none of ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from distserve.metrics import SLO

DATA = Path(__file__).parent.parent / "data" / "paper"
GOAL = 0.9  # section 6.1: 90 % of requests meet both targets

Points = list[tuple[float, float]]  # (x, y)


@dataclass(frozen=True)
class Case:
    """One model with one application (table 1, table 3, section 6)."""

    name: str
    model: str
    workload: str
    slo: SLO
    prefill: tuple[int, int]  # (tp, pp) of the paper's placement
    decode: tuple[int, int]
    baseline_tp: int  # of vLLM
    requests_per_device: int  # of the paper's runs
    fixed_rate: float  # requests/s and device while the targets are scaled
    goodput: dict[str, float | None]  # requests/s and device at the goal, by system
    scale: dict[str, float | None]  # smallest factor on both targets at the goal

    @property
    def title(self) -> str:
        model, _, workload = self.name.rpartition("-")
        names = {"sharegpt": "ShareGPT", "humaneval": "HumanEval", "longbench": "LongBench"}
        return f"{model.upper()}, {names[workload]}"


@cache
def load(name: str) -> dict[str, Any]:
    """One file, such as "fig08"."""
    table: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    return table


@cache
def cases() -> dict[str, Case]:
    """By name, in the paper's order."""
    found = {}
    for name, row in load("cases")["cases"].items():
        found[name] = Case(
            name=name,
            slo=SLO(row["ttft"], row["tpot"]),
            prefill=(row["prefill"][0], row["prefill"][1]),
            decode=(row["decode"][0], row["decode"][1]),
            **{
                key: row[key]
                for key in ("model", "workload", "baseline_tp", "requests_per_device", "fixed_rate", "goodput", "scale")
            },
        )
    return found


def points(rows: list[list[float]]) -> Points:
    """Pairs of a curve, by x."""
    return sorted((x, y) for x, y in rows)
