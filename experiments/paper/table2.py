"""Table 2: the simulator against the real system. The paper does not say with which model and targets, so that each of
its settings is simulated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distserve.metrics import SLO
from distserve.plan import Policy
from experiments.paper import living, plots, systems
from experiments.paper.lab import Cell, Lab
from experiments.paper.published import cases, load
from experiments.paper.systems import APART, WHOLE
from experiments.paper.words import number, table

NAME = "table2"
TITLE = "Table 2: simulated against real"


@dataclass(frozen=True)
class Setting:
    """What the table may be of."""

    case: str
    slo: SLO
    per_device: bool  # whether its rates are

    def __str__(self) -> str:
        unit = "per device" if self.per_device else "in total"
        return f"{cases()[self.case].title}, {self.slo.ttft:g} s and {self.slo.tpot:g} s, rates {unit}"


# Targets of table 1, and of the paper's first version (January 2024).
SETTINGS = (
    Setting("opt-13b-sharegpt", SLO(0.25, 0.1), True),
    Setting("opt-13b-sharegpt", SLO(0.2, 0.1), True),
    Setting("opt-13b-sharegpt", SLO(0.2, 0.1), False),
    Setting("opt-66b-sharegpt", SLO(2.5, 0.15), False),
    Setting("opt-66b-sharegpt", SLO(0.4, 0.1), False),
)


def run(lab: Lab) -> dict[str, Any]:
    rates = [row[0] for row in load(NAME)["rows"]][:: 3 if lab.quick else 1]
    tasks = [(setting, name, rate, lab.quick) for setting in SETTINGS for name in (WHOLE, APART) for rate in rates]
    found: dict[str, Any] = {"rates": rates, "settings": {str(setting): {} for setting in SETTINGS}}
    for (setting, name, _, _), joint in zip(tasks, lab.map(NAME, attained, tasks), strict=True):
        found["settings"][str(setting)].setdefault(name, []).append(joint)
    published = {row[0]: (row[1], row[3]) for row in load(NAME)["rows"]}
    for by_system in found["settings"].values():
        by_system["apart"] = [
            sum(abs(100 * mine - published[rate][at]) for rate, mine in zip(rates, by_system[name], strict=True))
            / len(rates)
            for at, name in enumerate((WHOLE, APART))
        ]
    _write(lab, found)
    _draw(lab, found)
    return found


def attained(setting: Setting, name: str, rate: float, quick: bool) -> float:
    """Joint attainment at the paper's length of run."""
    case = cases()[setting.case]
    system = (
        systems.apart(case.model, case.prefill, case.decode)
        if name == APART
        else systems.together(case.model, case.baseline_tp, Policy.PREFILL_FIRST)
    )
    length = living.as_published(system, case.requests_per_device, quick=quick)
    own = rate if setting.per_device else rate / system.devices
    return float(living.sample(system, case.workload, own, length).met(setting.slo).mean())


def _write(lab: Lab, found: dict[str, Any]) -> None:
    published = {row[0]: row[1:] for row in load(NAME)["rows"]}
    rows: list[list[Cell]] = []
    for setting, by_system in found["settings"].items():
        for at, rate in enumerate(found["rates"]):
            real = published[rate]
            rows.append([setting, "vLLM", rate, real[0], real[1], 100 * by_system[WHOLE][at]])
            rows.append([setting, "DistServe-Low", rate, real[2], real[3], 100 * by_system[APART][at]])
    head = ("setting", "system", "rate", "paper_real_percent", "paper_simulated_percent", "ours_percent")
    lab.table(NAME, head, rows)


def _draw(lab: Lab, found: dict[str, Any]) -> None:
    drawing, (axes,) = plots.panels(1, 2)
    rows = load(NAME)["rows"]
    for panel, name, real in zip(axes, (WHOLE, APART), (1, 3), strict=True):
        for colour, (setting, by_system) in enumerate(found["settings"].items()):
            pairs = [(x, 100 * y) for x, y in zip(found["rates"], by_system[name], strict=True)]
            plots.ours(panel, pairs, setting, colour + 1)
        plots.theirs(panel, [(row[0], row[real]) for row in rows], "real (paper)", 0)
        panel.set_title("vLLM" if name == WHOLE else "DistServe-Low")
        panel.set_xlabel("requests/s")
        panel.set_ylabel("requests that meet both targets, %")
        panel.set_ylim(-3, 103)
    plots.legend(drawing, axes[0], 1)
    lab.draw(NAME, drawing)


def section(found: dict[str, Any]) -> str:
    near = min(found["settings"], key=lambda setting: found["settings"][setting]["apart"][1])
    nearest = found["settings"][near]
    published = {row[0]: row[1:] for row in load(NAME)["rows"]}
    rows = []
    for at, rate in enumerate(found["rates"]):
        real = published[rate]
        rows.append(
            [number(rate)]
            + [f"{value:.1f}" for value in (*real[:2], 100 * nearest[WHOLE][at])]
            + [f"{value:.1f}" for value in (*real[2:], 100 * nearest[APART][at])]
        )
    head = ["requests/s", "vLLM real", "simulated by the authors", "by us"]
    text = (
        f"The setting in which ours is nearest to the real DistServe is {near}. In %:\n\n"
        + table([*head, "DistServe-Low real", *head[2:]], rows)
        + "\n\nMean distance to the real columns in points, for each setting that was tried:\n\n"
    )
    settings = [[name, *(f"{value:.1f}" for value in by["apart"])] for name, by in found["settings"].items()]
    return (
        text
        + table(["setting", "vLLM", "DistServe-Low"], settings)
        + "\n\nThe paper names no setting. The one above is near for DistServe and far for vLLM, whose costs on "
        "OPT-66B no logged run confirms; with no setting do both columns agree. The claim itself, that a simulator can "
        "be as near as that to a real system, is tested on logged runs instead, one by one "
        "([accuracy](../accuracy.md))."
    )
