"""The headline: how many times more requests, and how much tighter targets, than colocated. Made of what figures 8 and
9 kept; simulates nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.paper import fig08, fig09, plots
from experiments.paper.attainment import LENGTHS
from experiments.paper.lab import Cell, Lab
from experiments.paper.published import Case, cases, load
from experiments.paper.systems import APART, CHUNKED, PUBLISHED, SWIFT, WHOLE
from experiments.paper.words import NONE, listed, number, table, times

NAME = "gains"
TITLE = "The headline: more requests, tighter targets"
_REASONS = """Against vLLM as it was, the gain is there. It is smaller in steady state than in runs as short as
the paper's wherever answers are long: the decode instances of the paper's placements have little KV memory, which
a short run does not fill. Against the same engine with both phases on each GPU there is little or no gain, and
often a loss, with these targets: they allow a TPOT several times that of an idle GPU, so that prompts between
decode steps break no target, and a colocated instance uses all of its memory and arithmetic for both phases.
Disaggregation wins where a target leaves no room for the other phase: OPT-13B's TTFT for chunked prefill, and the
TPOT of LongBench for any colocated instance, whose decode steps its long prompts hold up.
That is why the search of this project looks at colocated instances, too. How much of the gain over vLLM is
scheduling can be read off the last columns, which differ from vLLM's in the engine alone."""
BASELINES = (WHOLE, CHUNKED, SWIFT)
_NOTHING: dict[str, Any] = {"gain": None}  # over what was not simulated


def run(lab: Lab) -> dict[str, Any]:
    kept = [lab.kept(module.NAME) for module in (fig08, fig09)]
    found: dict[str, Any] = {}
    for part in kept:
        assert part is not None, "figures 8 and 9 are run before"
        for name, kinds in part.items():
            found[name] = {
                length: {"rate": _rates(kinds["rate"], length), "scale": _scales(kinds["scale"], length)}
                for length in LENGTHS
            }
    _write(lab, found)
    _draw(lab, found)
    return found


def _rates(by_system: dict[str, Any], length: str) -> dict[str, Any]:
    """Goodput of each system, and the gain over each baseline; `more` says that the gain is at least so much, because
    the baseline does not meet the goal at any rate that was tried."""
    curves = {system: by_length[length] for system, by_length in by_system.items()}
    apart = curves[APART]["goodput"]
    gains = {}
    for name in BASELINES:
        if name not in curves:
            gains[name] = _NOTHING
            continue
        own = curves[name]["goodput"]
        lowest = curves[name]["points"][0]["rate"]
        gains[name] = {
            "gain": None if apart is None else apart / (own or lowest),
            "more": own is None,
            "less": curves[name]["at_least"],
        }
    return {"goodput": {system: curve["goodput"] for system, curve in curves.items()}, "gains": gains}


def _scales(by_system: dict[str, Any], length: str) -> dict[str, Any]:
    """The smallest scale of each system, and the gain over each baseline; `grows`: queues grew, so that a longer run
    would give another number."""
    curves = {system: by_length[length] for system, by_length in by_system.items()}
    apart = curves[APART]["needed"]
    gains = {}
    for name in BASELINES:
        if name not in curves:
            gains[name] = _NOTHING
            continue
        needed = curves[name]["needed"]
        gains[name] = {
            "gain": needed / apart if needed is not None and apart is not None else None,
            "grows": [system for system in (APART, name) if curves[system]["grows"]],
        }
    return {"needed": {system: curve["needed"] for system, curve in curves.items()}, "gains": gains}


def published_gain(case: Case, baseline: str, kind: str) -> float | None:
    """Of the curve that the baseline is held against."""
    apart, other = (
        (case.goodput if kind == "rate" else case.scale).get(PUBLISHED.get(name, "")) for name in (APART, baseline)
    )
    if apart is None or other is None:
        return None
    return apart / other if kind == "rate" else other / apart


def _write(lab: Lab, found: dict[str, Any]) -> None:
    rows: list[list[Cell]] = []
    for name, baseline, kind, each in _each(found):
        rows.append(
            [name, kind, baseline, PUBLISHED.get(baseline), published_gain(cases()[name], baseline, kind)]
            + [each[length]["gain"] for length in LENGTHS]
        )
    head = ("case", "gain_in", "baseline", "paper_baseline", "paper_gain", "ours_as_published", "ours_steady")
    lab.table(NAME, head, rows)


def _each(found: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(case, baseline, kind, gain by length)."""
    for kind in ("rate", "scale"):
        for name, by_length in found.items():
            for baseline in BASELINES:
                yield name, baseline, kind, {length: by_length[length][kind]["gains"][baseline] for length in LENGTHS}


def _draw(lab: Lab, found: dict[str, Any]) -> None:
    drawing, (axes,) = plots.panels(1, 2)
    for panel, kind in zip(axes, ("rate", "scale"), strict=True):
        for at, name in enumerate(found):
            for offset, baseline in enumerate(BASELINES):
                place = at + 0.27 * (offset - 1)
                paper = published_gain(cases()[name], baseline, kind)
                first = "" if at == 0 else "_"
                if paper is not None:
                    label = f"{first}{PUBLISHED[baseline]} (paper)"
                    plots.theirs(panel, [(place, paper)], label, offset + 1)
                for mark, length in (("x", LENGTHS[0]), ("s", LENGTHS[1])):
                    gain = found[name][length][kind]["gains"][baseline]["gain"]
                    if gain is not None:
                        label = f"{first}{baseline}, {length}"
                        plots.mark(panel, place + (0.07 if mark == "s" else -0.07), gain, mark, label, offset + 1)
        plots.goal(panel, 1.0)
        panel.set_yscale("log")
        panel.set_xticks(range(len(found)), [cases()[name].title.replace(", ", "\n") for name in found], fontsize=6)
        panel.set_ylabel("times the rate" if kind == "rate" else "times tighter targets")
    plots.legend(drawing, axes[0])
    lab.draw(NAME, drawing)


def _gain(each: dict[str, Any]) -> str:
    text = times(each["gain"])
    if each.get("more"):
        text = f"over {text}"
    if each.get("less"):
        text = f"under {text}"
    return text + ("*" if each.get("grows") else "")


def section(found: dict[str, Any]) -> str:
    parts = []
    for kind, what in (("rate", "Times the requests per device"), ("scale", "Times tighter targets")):
        head = [what]
        for baseline in BASELINES:
            head += [f"over {PUBLISHED.get(baseline)}, paper"] * (baseline in PUBLISHED)
            head += [f"over {baseline}, {LENGTHS[0]}", LENGTHS[1]]
        rows = []
        for name in found:
            row = [cases()[name].title]
            for baseline in BASELINES:
                if baseline in PUBLISHED:
                    row.append(times(published_gain(cases()[name], baseline, kind)))
                row += [_gain(found[name][length][kind]["gains"][baseline]) for length in LENGTHS]
            rows.append(row)
        parts.append(table(head, rows))
    parts.append(
        "`over`: the baseline does not meet the goal at the lowest rate that was tried, which the ratio is to. `*`: at "
        "the rate at which targets are scaled the queues of one of the two grow without end, so that the ratio says "
        "how long the run was."
    )
    parts.append(_summary(found))
    rows = [
        [cases()[name].title]
        + [
            number(found[name][length]["rate"]["goodput"].get(system))
            for system in (APART, *BASELINES)
            for length in LENGTHS
        ]
        for name in found
    ]
    head = ["requests/s per device at the goal", *(f"{s}, {length}" for s in (APART, *BASELINES) for length in LENGTHS)]
    parts.append(table(head, rows))
    return "\n\n".join(parts)


def _summary(found: dict[str, Any]) -> str:
    """The span of each gain in words, where it is one."""
    headline = load("cases")["headline"]
    rates, scales = (" to ".join(f"{gain}x" for gain in headline[kind]) for kind in ("rate", "scale"))
    lines = [f"The paper's headline is {rates} more requests and {scales} tighter targets. Ours:", ""]
    for baseline in BASELINES:
        for length in LENGTHS:
            each_gain = [found[name][length]["rate"]["gains"][baseline] for name in found]
            num_cases = sum(each != _NOTHING for each in each_gain)
            more = sum((each["gain"] or 0.0) > 1 for each in each_gain)
            spans = [f"more requests in {more} of {num_cases} cases"]
            for kind, what in (("rate", "the requests"), ("scale", "tighter targets")):
                gains = [found[name][length][kind]["gains"][baseline] for name in found]
                known = [each["gain"] for each in gains if each["gain"] is not None and not each.get("grows")]
                spans.append(f"{number(min(known))}x to {number(max(known))}x {what}" if known else f"{NONE} {what}")
            lines.append(f"- against {baseline}, {length}: {listed(spans)};")
    lines[-1] = lines[-1].removesuffix(";") + "."
    return "\n".join([*lines, "", _REASONS])
