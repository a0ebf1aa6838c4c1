"""Figure 1: the same GPU with both phases, with prompts only, with answers only."""

from __future__ import annotations

from typing import Any

import numpy as np

from distserve.plan import InstanceSpec, Plan, Policy, Role
from distserve.traces import Arrival
from distserve.workload import Workload
from experiments.paper import living, plots, systems
from experiments.paper.curves import crossing
from experiments.paper.lab import Cell, Lab
from experiments.paper.living import Length
from experiments.paper.published import load, points
from experiments.paper.systems import System
from experiments.paper.words import NONE, number, table

NAME = "fig01"
TITLE = "Figure 1: why to disaggregate"
MODEL = "facebook/opt-13b"
LENGTHS = Workload("512 and 64 tokens", (Arrival(0.0, 512, 64),), timed=False)
PREFILLS = 8  # GPUs that feed the one that decodes, so that it alone is loaded

BOTH, CHUNKED, PREFILL, DECODE = "colocated", "colocated, chunked", "prefill only", "decode only"
ONLY = {"ttft": (BOTH, CHUNKED, PREFILL), "tpot": (BOTH, CHUNKED, DECODE)}


def run(lab: Lab) -> dict[str, Any]:
    paper = load(NAME)
    rates = sorted({x for kind in ONLY for curve in paper[kind].values() for x, _ in curve})
    rates = rates[::5] if lab.quick else sorted({*rates, *(rate + 0.5 for rate in rates[:-1])})
    length = Length("steady", 60, 1, 0.1, 0.95) if lab.quick else Length("steady", 3000, 1, 0.1, 0.95)
    tasks = [(name, rate, length) for name in (BOTH, CHUNKED, PREFILL, DECODE) for rate in rates]
    found: dict[str, Any] = {kind: {name: [] for name in names} for kind, names in ONLY.items()}
    for (name, rate, _), (ttft, tpot) in zip(tasks, lab.map(NAME, quantiles, tasks), strict=True):
        for kind, value in (("ttft", ttft), ("tpot", tpot)):
            if name in ONLY[kind]:
                found[kind][name].append([rate, value])
    found["goodput"] = {name: _goodput(found, paper["slo"], name) for name in (BOTH, CHUNKED, PREFILL, DECODE)}
    _write(lab, found)
    _draw(lab, found)
    return found


def system(name: str) -> System:
    if name in (BOTH, CHUNKED):
        return systems.together(MODEL, 1, Policy.PREFILL_FIRST if name == BOTH else Policy.CHUNKED)
    feeders = 1 if name == PREFILL else PREFILLS
    return System(name, MODEL, Plan((InstanceSpec(Role.PREFILL, count=feeders), InstanceSpec(Role.DECODE))))


def quantiles(name: str, rate: float, length: Length) -> tuple[float, float]:
    """P90 of TTFT and of TPOT in seconds. `rate`: requests/s of the one GPU that is looked at."""
    chosen = system(name)
    found = living.sample(chosen, LENGTHS, rate / chosen.devices, length)
    return float(np.quantile(found.ttft, 0.9)), float(np.quantile(found.tpot, 0.9))


def _goodput(found: dict[str, Any], slo: dict[str, float], name: str) -> float | None:
    """The highest rate with the P90 of each latency that is looked at within its target, as the figure has it."""
    ends = []
    for kind, names in ONLY.items():
        if name in names:
            curve = [(rate, slo[kind] / value) for rate, value in found[kind][name]]
            ends.append(crossing(curve, 1.0) or (curve[-1][0] if curve[0][1] >= 1 else None))
    return None if None in ends else min(end for end in ends if end is not None)


def _write(lab: Lab, found: dict[str, Any]) -> None:
    rows: list[list[Cell]] = []
    for kind, names in ONLY.items():
        for name in names:
            theirs = dict(points(load(NAME)[kind].get(name, [])))
            rows += [[kind, name, rate, theirs.get(rate), value] for rate, value in found[kind][name]]
    lab.table(NAME, ("p90_of", "gpu_does", "rate", "paper_seconds", "ours_seconds"), rows)


def _draw(lab: Lab, found: dict[str, Any]) -> None:
    paper = load(NAME)
    drawing, (axes,) = plots.panels(1, 2)
    for panel, (kind, names) in zip(axes, ONLY.items(), strict=True):
        limit = 2.5 * paper["slo"][kind]
        for name in names:
            colour = (BOTH, CHUNKED, PREFILL, DECODE).index(name)
            plots.ours(panel, [(x, y) for x, y in found[kind][name] if y <= limit], name, colour)
            if name in paper[kind]:
                plots.theirs(panel, points(paper[kind][name]), f"{name} (paper)", colour)
        plots.goal(panel, paper["slo"][kind])
        panel.set_ylim(0, limit)
        panel.set_xlabel("requests/s")
        panel.set_ylabel(f"P90 {kind.upper()}, s")
    plots.legend(drawing, axes[0], 2)
    lab.draw(NAME, drawing)


def section(found: dict[str, Any]) -> str:
    theirs, mine = load(NAME)["goodput"], found["goodput"]
    rows = [[name, number(theirs[name]) if name in theirs else NONE, number(mine[name])] for name in mine]
    both, prefill, decode = (mine[name] for name in (BOTH, PREFILL, DECODE))
    text = table(["requests/s within the targets", "paper", "ours"], rows)
    if both and prefill and decode:
        apart = 1 / (1 / prefill + 1 / decode)
        paper = 1 / (1 / theirs[PREFILL] + 1 / theirs[DECODE])
        text += (
            f"\n\nPut together in the ratio that balances them, one prefill and one decode GPU serve {number(apart)} "
            f"requests/s per device, {number(apart / both)} times what the colocated one serves (paper, by the same "
            f"arithmetic: {number(paper)}, {number(paper / theirs[BOTH])} times)."
        )
        if mine[CHUNKED]:
            text += (
                f" Against chunked prefill, which the paper's figure does not have, it is "
                f"{number(apart / mine[CHUNKED])} times."
            )
    first = {name: (points(load(NAME)["ttft"][name])[0][1], found["ttft"][name][0][1]) for name in (BOTH, PREFILL)}
    return (
        f"{text}\n\nThe colocated GPU and the one that only decodes agree with the paper. The one that only computes "
        f"prompts does better in ours: at the lowest rate, where nothing waits, the paper's P90 is "
        f"{number(first[PREFILL][0])} s and ours {number(first[PREFILL][1])} s. Our step times are those of the "
        "authors' "
        f"engine of April 2024, in which prompts that wait share a step; the figure was drawn before."
    )
