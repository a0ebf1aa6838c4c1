"""Table 3, the placements, beside those that our search finds in the same cluster."""

from __future__ import annotations

from typing import Any

from experiments.paper import fig08, fig09, plots, searching
from experiments.paper.attainment import LENGTHS
from experiments.paper.lab import Cell, Lab
from experiments.paper.published import Case, cases
from experiments.paper.systems import APART
from experiments.paper.words import number, table

NAME = "placements"
TITLE = "Table 3: the placements"
KINDS = {"apart": searching.APART, "together": searching.TOGETHER}


def run(lab: Lab) -> dict[str, Any]:
    chosen = [case for case in cases().values() if not lab.quick or case.model == "facebook/opt-13b"]
    tasks = [_task(case, kinds, lab.quick) for case in chosen for kinds in KINDS.values()]
    answers = iter(lab.map(NAME, searching.best, tasks))
    found: dict[str, Any] = {}
    for case in chosen:
        found[case.name] = {"paper": _paper(lab, case)}
        for kind in KINDS:
            best = next(answers)
            found[case.name][kind] = {
                "said": best.said,
                "devices": best.devices,
                "goodput": best.goodput,
                "unit": best.unit.to_toml(),
            }
    _write(lab, found)
    _draw(lab, found)
    return found


def _task(case: Case, kinds: tuple[str, ...], quick: bool) -> tuple[Any, ...]:
    """One node, or as many as the paper's placement takes."""
    ranks = max(tp * pp for tp, pp in (case.prefill, case.decode))
    nodes = 1 if ranks <= 8 else case.prefill[1]
    devices = 2 if quick else 8 * nodes
    return case.model, case.workload, case.slo, f"a100-{nodes}x8", devices, True, kinds


def _paper(lab: Lab, case: Case) -> dict[str, float | None]:
    """Simulated goodput, in steady state, of the paper's placement."""
    for module in (fig08, fig09):
        kept = (lab.kept(module.NAME) or {}).get(case.name)
        if kept is not None:
            return {APART: kept["rate"][APART][LENGTHS[1]]["goodput"]}
    return {APART: None}


def said(case: Case) -> str:
    """The paper's placement, as the search says its own."""
    parts = [
        f"1 {role} tp{tp}" + (f" pp{pp}" if pp > 1 else "")
        for role, (tp, pp) in (("prefill", case.prefill), ("decode", case.decode))
    ]
    return " + ".join(parts)


def _write(lab: Lab, found: dict[str, Any]) -> None:
    rows: list[list[Cell]] = []
    for name, each in found.items():
        case = cases()[name]
        row: list[Cell] = [name, said(case), case.goodput[APART], each["paper"][APART]]
        for kind in KINDS:
            row += [each[kind]["said"], each[kind]["devices"], each[kind]["goodput"]]
        rows.append(row)
    head = ["case", "paper_placement", "paper_goodput", "paper_placement_simulated"]
    for kind in KINDS:
        head += [f"ours_{kind}", f"ours_{kind}_devices", f"ours_{kind}_goodput"]
    lab.table(NAME, head, rows)


def _draw(lab: Lab, found: dict[str, Any]) -> None:
    drawing, ((panel,),) = plots.panels(1, 1)
    for at, (name, each) in enumerate(found.items()):
        label = "" if at == 0 else "_"
        published = cases()[name].goodput[APART]
        if published is not None:
            plots.theirs(panel, [(at - 0.2, published)], f"{label}the paper's figure", 0)
        bars = [("the paper's placement, simulated", each["paper"][APART], 0)]
        bars += [(f"our {kind}", each[kind]["goodput"], colour) for colour, kind in enumerate(KINDS, 1)]
        for offset, (what, value, colour) in enumerate(bars):
            if value is not None:
                plots.mark(panel, at + 0.15 * (offset - 0.5), value, "s", label + what, colour)
    panel.set_xticks(range(len(found)), [cases()[name].title.replace(", ", "\n") for name in found], fontsize=5)
    panel.set_yscale("log")
    panel.set_ylabel("requests/s per device at the goal")
    plots.legend(drawing, panel, 2)
    lab.draw(NAME, drawing)


def section(found: dict[str, Any]) -> str:
    head = ["", "paper's placement", "goodput, paper", "simulated", "our best apart", "goodput"]
    rows = []
    for name, each in found.items():
        case = cases()[name]
        row = [case.title, said(case), number(case.goodput[APART]), number(each["paper"][APART])]
        for kind in KINDS:
            row += [each[kind]["said"], number(each[kind]["goodput"])]
        rows.append(row)
    return (
        "Requests/s per device at the goal in steady state, on as many nodes as the paper's placement takes, KV kept "
        "inside nodes (Algorithm 2). Our search, for instances apart and for colocated ones:\n\n"
        + table([*head, "our best colocated", "goodput"], rows)
        + "\n\nThe search judges in steady state, by joint attainment, and counts KV memory on both sides. The "
        "authors' judged each phase apart, over a few hundred requests and without the decode side's KV "
        "memory, and so gave decode less of it. Colocated instances are on the step times of DistServe's "
        "engine; several of them share bursts, which the single instance of figures 8 and 9 cannot. Where "
        "attainment falls slowly with the rate, as with HumanEval, goodputs that are a few percent apart "
        "are equal within the noise of the runs."
    )
