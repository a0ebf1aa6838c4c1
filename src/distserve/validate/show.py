"""What a person sees: progress, and predicted beside measured as tables. Measures nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from distserve.metrics import SLO
from distserve.tables import milliseconds
from distserve.validate.capacity import Capacity
from distserve.validate.compare import Cell, Verdict

_WIDE = 240  # characters


def say(message: str) -> None:
    """A line of talk."""
    print(f"distserve: {message}", file=sys.stderr)


def console(*, stderr: bool) -> Console:
    """Whose tables keep their form where nobody looks at them: in a file or a pipe."""
    found = Console(stderr=stderr, soft_wrap=True)
    return found if found.is_terminal else Console(stderr=stderr, soft_wrap=True, width=_WIDE)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@contextmanager
def steps(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar; call it as each step is done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        say(title)
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def cells(found: Sequence[Cell], console: Console) -> None:
    """A table for each plan and workload: a line for each rate, measured and predicted in pairs."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in found:
        groups.setdefault((cell.plan, cell.workload), []).append(cell)
    for (plan, workload), mine in groups.items():
        console.print(f"[bold]{plan}[/bold], {workload}", highlight=False)
        console.print(_table(mine), highlight=False)
        console.print()


def _table(found: Sequence[Cell]) -> Table:
    slos = list(dict.fromkeys(cell.slo for cell in found))
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    table.add_column("rate", justify="right")
    for slo in slos:
        table.add_column(f"attainment\n{brief(slo)}", justify="right")
    for name in ("TTFT p50", "TTFT p90", "TPOT p50", "TPOT p90"):
        table.add_column(f"{name}\nmeasured, predicted", justify="right")
    table.add_column("steps\nmeasured, predicted", justify="right")
    table.add_column("")
    by_rate: dict[float, list[Cell]] = {}
    for cell in sorted(found, key=lambda cell: cell.rate):
        by_rate.setdefault(cell.rate, []).append(cell)
    for rate, row in by_rate.items():
        judged = {cell.slo: cell for cell in row}
        latencies = [
            latency_pair(row[0], *name.lower().split()) for name in ("TTFT p50", "TTFT p90", "TPOT p50", "TPOT p90")
        ]
        attainments = [attainment_pair(judged[slo]) if slo in judged else "" for slo in slos]
        table.add_row(f"{rate:g}/s", *attainments, *latencies, step_pairs(row[0]), row[0].spoiled)
    return table


def attainment_pair(cell: Cell) -> str:
    noise = f" ±{100 * cell.noise:.1f}" if cell.noise is not None else ""
    return f"{cell.attainment:.1%}{noise}, {cell.predicted.attainment.joint:.1%} ({100 * cell.error:+.1f})"


def latency_pair(cell: Cell, name: str, part: str) -> str:
    measured, predicted = cell.latency(name, part)
    error = cell.latency_error(name, part)
    relative = f" ({100 * error:+.0f}%)" if error is not None else ""
    return f"{milliseconds(measured)}, {milliseconds(predicted)}{relative}"


def step_pairs(cell: Cell) -> str:
    """The mean step of each role."""
    return "; ".join(
        f"{role} {milliseconds(each.measured)}, {milliseconds(each.predicted)} ({100 * (1 / each.ratio - 1):+.0f}%)"
        for role, each in cell.steps.items()
    )


def brief(slo: SLO) -> str:
    parts = [f"{value:g} s" if value is not None else "any" for value in (slo.ttft, slo.tpot)]
    return ", ".join(parts)


def capacities(found: Sequence[Capacity], goal: float, console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for name in (f"rate up to which {goal:.0%} attain", "SLO (TTFT, TPOT)", "measured", "predicted", "error"):
        table.add_column(name, justify="left" if name[0] in "rS" else "right")
    for each in found:
        error = "" if each.error is None else f"{each.error:+.1%}{'' if each.exact else ' or more'}"
        rates = (
            f"{value:.3g}/s" if value is not None else "not among the rates"
            for value in (each.measured, each.predicted)
        )
        table.add_row(f"{each.plan}, {each.workload}", brief(each.slo), *rates, error)
    console.print(table, highlight=False)
    console.print()


def verdicts(found: Sequence[Verdict], console: Console, what: str = "error of the prediction") -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for name in (what, "mean", "target", "worst", "bias", "noise of repeats", "cells", ""):
        table.add_column(name, justify="left" if name in (what, "") else "right")
    for each in found:
        if each.mean is None or each.worst is None or each.bias is None:
            table.add_row(each.what, "-", _amount(each.target, each), "", "", "", "0", "nothing to compare")
            continue
        table.add_row(
            each.what,
            _amount(each.mean, each),
            _amount(each.target, each),
            _amount(each.worst, each),
            _amount(each.bias, each, "+"),
            "-" if each.noise is None else _amount(each.noise, each),
            str(each.cells),
            "met" if each.met else "not met",
        )
    console.print(table, highlight=False)


def _amount(share: float, verdict: Verdict, sign: str = "") -> str:
    return f"{100 * share:{sign}.1f} {'points' if verdict.points else '%'}"


def busy(found: Sequence[Cell]) -> str:
    """How much of a core the client used, in the mean."""
    shares = [run.client["cpu"] for cell in found for run in cell.runs.measured if "cpu" in run.client]
    return f"{fmean(shares):.1%} of a core" if shares else "-"
