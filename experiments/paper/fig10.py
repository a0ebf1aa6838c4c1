"""Figure 10: where OPT-175B's latency goes, and how long KV transfers take."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.paper import living, plots, systems
from experiments.paper.lab import Cell, Lab
from experiments.paper.living import STAGES
from experiments.paper.published import cases, load, points
from experiments.paper.words import number, table

NAME = "fig10"
TITLE = "Figure 10: where the time goes"
CASES = {"OPT-13B": "opt-13b-sharegpt", "OPT-66B": "opt-66b-sharegpt", "OPT-175B": "opt-175b-sharegpt"}
_MARKS = (0.1, 0.5, 0.9, 0.95)  # quantiles of the table


def run(lab: Lab) -> dict[str, Any]:
    paper = load(NAME)
    rates = paper["rate_per_device"][:: 4 if lab.quick else 1]
    length = living.as_published(_system("OPT-175B"), _case("OPT-175B").requests_per_device, quick=lab.quick)
    parts = lab.map(f"{NAME} shares", shares, [(rate, length.requests, length.seeds) for rate in rates])
    loads = [(model, 40 if lab.quick else 1000) for model in CASES]
    found = {
        "rates": rates,
        "shares": {stage: [share[at] for share in parts] for at, stage in enumerate(STAGES)},
        "pulls": dict(zip(CASES, lab.map(f"{NAME} pulls", pulls, loads), strict=True)),
    }
    _write(lab, found)
    _draw(lab, found)
    return found


def _case(model: str) -> Any:
    return cases()[CASES[model]]


def _system(model: str) -> systems.System:
    case = _case(model)
    return systems.apart(case.model, case.prefill, case.decode)


def shares(rate: float, requests: int, seeds: int) -> list[float]:
    """Of OPT-175B's `STAGES`, at this rate a device; the mean over as many draws."""
    system = _system("OPT-175B")
    drawn = [
        living.shares(living.lives(system, living.workload("sharegpt"), rate * system.devices, requests, seed))
        for seed in range(seeds)
    ]
    return [float(share) for share in np.mean(drawn, axis=0)]


def pulls(model: str, requests: int) -> list[float]:
    """Hundredths of the distribution of pull times, in seconds, at half the rate of the scaled targets: none waits for
    another."""
    system, case = _system(model), _case(model)
    rate = case.fixed_rate / 2 * system.devices
    times = living.pulls(living.lives(system, living.workload("sharegpt"), rate, requests, 0))
    return [float(value) for value in np.quantile(times, np.linspace(0, 1, 101))]


def _published_quantile(model: str, share: float) -> float:
    """Linear between the points of the drawn distribution."""
    pairs = load(NAME)["pulls"][model]
    return float(np.interp(share, [y for _, y in pairs], [x for x, _ in pairs]))


def _write(lab: Lab, found: dict[str, Any]) -> None:
    paper = load(NAME)
    rows: list[list[Cell]] = []
    for at, rate in enumerate(found["rates"]):
        place = paper["rate_per_device"].index(rate)
        rows += [
            ["share of " + stage, rate, paper["shares"][stage][place], 100 * found["shares"][stage][at]]
            for stage in STAGES
        ]
    for model, hundredths in found["pulls"].items():
        rows += [
            [f"pull {model}", at / 100, 1e3 * _published_quantile(model, at / 100), 1e3 * hundredths[at]]
            for at in range(0, 101, 5)
        ]
    lab.table(NAME, ("what", "rate_or_quantile", "paper_percent_or_ms", "ours_percent_or_ms"), rows)


def _draw(lab: Lab, found: dict[str, Any]) -> None:
    paper = load(NAME)
    drawing, (axes,) = plots.panels(1, 2)
    for colour, stage in enumerate(STAGES):
        plots.ours(
            axes[0],
            [(x, 100 * y) for x, y in zip(found["rates"], found["shares"][stage], strict=True)],
            stage.replace("_", " "),
            colour,
        )
        theirs = list(zip(paper["rate_per_device"], paper["shares"][stage], strict=True))
        plots.theirs(axes[0], theirs, "_", colour)
    axes[0].set_xlabel("requests/s per device, OPT-175B")
    axes[0].set_ylabel("share of the latency, % (points: paper)")
    for colour, (model, hundredths) in enumerate(found["pulls"].items()):
        plots.ours(axes[1], [(1e3 * x, at) for at, x in enumerate(hundredths)], model, colour)
        curve = [(1e3 * x, 100 * y) for x, y in points(paper["pulls"][model]) if x > 0][::6]
        plots.theirs(axes[1], curve, f"{model} (paper)", colour)
    axes[1].set_xscale("log")
    axes[1].set_xlabel("pull, ms")
    axes[1].set_ylabel("pulls that take no longer, %")
    for panel in axes:
        panel.legend(fontsize=6, framealpha=0.6)
    lab.draw(NAME, drawing)


def section(found: dict[str, Any]) -> str:
    paper = load(NAME)
    rows = []
    for at, rate in enumerate(found["rates"]):
        place = paper["rate_per_device"].index(rate)
        rows.append(
            [number(rate)]
            + [f"{paper['shares'][stage][place]:.1f} / {100 * found['shares'][stage][at]:.1f}" for stage in STAGES]
        )
    stages = [stage.replace("_", " ") for stage in STAGES]
    text = "Shares of the latency in %, paper / ours, the mean over requests:\n\n"
    text += table(["requests/s per device", *stages], rows)
    rows = [
        [model]
        + [f"{1e3 * _published_quantile(model, q):.1f} / {1e3 * hundredths[round(100 * q)]:.1f}" for q in _MARKS]
        for model, hundredths in found["pulls"].items()
    ]
    text += "\n\nPulls in ms, paper / ours:\n\n" + table(["", *(f"P{100 * q:.0f}" for q in _MARKS)], rows)
    longest = found["pulls"]["OPT-175B"][-1]
    seconds, below = zip(*points(load(NAME)["pulls"]["OPT-175B"]), strict=True)
    tail = 1 - float(np.interp(longest, seconds, below))
    transfer = max(found["shares"]["transmission"])
    return (
        f"{text}\n\nThe shares agree where nothing is loaded: decode takes most of the time, transfers at most "
        f"{100 * transfer:.1f} % of it, as in the paper. At high rates the prompts' queue grows in ours and the decode "
        "queue in the paper's: the datasheet's estimate makes prompts slower, or decode quicker, than they were. Pulls "
        "of OPT-13B take as long as in the paper. Larger models pull over several links at once, and ours come as "
        f"soon as links allow; {100 * tail:.0f} % of the paper's pulls of OPT-175B take longer than any of ours, for "
        "which our model has no cause: stages that wait for each other, or KV that crossed nodes, would look like it."
    )
