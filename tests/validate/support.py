"""Costs and measurements made up for tests: steps of a device that nobody has, and runs that the simulator itself lived
under other costs, so that what a comparison must find is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distserve.costs.choose import choose_costs
from distserve.costs.profile import ProfileCosts
from distserve.metrics import default_warmup
from distserve.plan import Plan
from distserve.sim.simulate import imagine
from distserve.validate import grid
from distserve.validate.record import Key, Measured, Recording
from distserve.workload import Workload

MODEL = "smollm2-135m-instruct"


def costs_table(slower: float = 1.0, **engine: Any) -> dict[str, Any]:
    """A costs file; every step takes `slower` times as long."""
    entry = {
        "prefill": [[0.02 * slower, 0.0003 * slower, 1e-8 * slower]],
        "decode": [[1, 0.03 * slower, 1e-6 * slower, 0.001 * slower]],
    }
    return {
        "format": 1,
        "device": "cpu",
        "dtype": "bfloat16",
        "date": "2026-01-01",
        "source": "made up",
        "note": "",
        "machine": {"fingerprint": "nowhere", "memory": 8 << 30, "link_bandwidth": 5e9},
        "engine": {"pull_bandwidth": 5e9, "block_size": 32, "kv_memory": 1 << 30, **engine},
        "models": {MODEL: {"1": entry}},
    }


def write_costs(path: Path, slower: float = 1.0, **engine: Any) -> Path:
    path.write_text(json.dumps(costs_table(slower, **engine)))
    return path


def load_costs(path: Path) -> ProfileCosts:
    costs = choose_costs(MODEL, "cpu", path)
    assert isinstance(costs, ProfileCosts)
    return costs


def run_of(key: Key, plan: Plan, costs: ProfileCosts, workload: Workload) -> Measured:
    """What a live server would measure whose steps take what these costs say."""
    lived = imagine(plan, workload, costs)
    return Measured(key, default_warmup(workload.span), lived.end, lived.records, {"cpu": 0.02, "sent_share": 1.0})


def recording(path: Path | None, costs: ProfileCosts, rates: tuple[float, ...], repeats: int = 1) -> Recording:
    """Two plans under one workload, "measured" with these costs."""
    found = Recording(path, MODEL, "nowhere", "")
    found.begin()
    workload = Workload.load("sharegpt").scaled(0.25, 0.25)
    for name in ("1p1d", "2c-whole"):
        given = grid.PLANS[name]
        served = grid.pinned(given, costs, MODEL, "cpu")
        found.add_plan(name, given, served)
        for rate in rates:
            for repeat in range(repeats):
                key = Key(name, "sharegpt:0.25", rate, 0, repeat)
                found.add(run_of(key, served, costs, workload.draw(rate, 120)))
    return found
