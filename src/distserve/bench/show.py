"""What a person sees: a live table while the load runs, and the reports after it. Only reads; measures nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from distserve.bench.client import UNFINISHED
from distserve.bench.measure import Measure, Outcome
from distserve.bench.search import Found
from distserve.metrics import CONFIDENCE
from distserve.tables import milliseconds, rounded

_RECENT = 500  # requests that the live figures look at
_REFRESH = 2.0  # times a second; a refresh takes a few ms, in which no byte is read


class _Board:
    """The live table; rich asks for it anew at each refresh."""

    def __init__(self, measure: Measure, title: str, before: Sequence[Outcome]) -> None:
        self._measure = measure
        until = measure.offer.until
        self._total = until.requests if until is not None else measure.load.total
        self._before = sweep(before) if before else None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task(title, total=self._total)

    def __rich__(self) -> Group:
        run, slo = self._measure.load.run, self._measure.slo
        recent = [result.record for result in run.results[-_RECENT:]]
        good = [record for record in recent if record.ok]
        self._bar.update(self._task, completed=min(self._total, len(run.results)))
        table = Table.grid(padding=(0, 3))
        failed = sum(not result.record.ok for result in run.results)
        table.add_row("in flight", "no token yet", "failed", "TTFT p50", "TPOT p50", "targets met", style="dim")
        table.add_row(
            str(run.in_flight),
            str(self._measure.waiting),
            str(failed),
            milliseconds(median([r.ttft for r in good if r.ttft is not None] or [float("nan")])),
            milliseconds(median([r.tpot for r in good if r.tpot is not None] or [float("nan")])),
            f"{sum(map(slo.met, recent)) / len(recent):.1%}" if recent else "-",
        )
        return Group(*([self._before] if self._before is not None else []), self._bar, table)


@contextmanager
def live(measure: Measure, title: str, before: Sequence[Outcome]) -> Iterator[None]:
    """Shows the load's progress on stderr, where that is a terminal, below what earlier runs said."""
    terminal = Console(stderr=True)
    if not terminal.is_terminal:
        say(f"{title}: {measure.load.total} requests")
        yield
        return
    board = _Board(measure, title, before)
    with Live(get_renderable=board.__rich__, console=terminal, refresh_per_second=_REFRESH, transient=True):
        yield


@contextmanager
def steps(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for what comes before the load; call it with how much is done."""
    terminal = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=terminal, transient=True
    )
    if not terminal.is_terminal:
        yield lambda done: None
        return
    with bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


def sweep(outcomes: Sequence[Outcome]) -> Table:
    """All runs, a line each, by rate."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("rate", "attained", "95% sure", "TTFT p50", "p90", "TPOT p50", "p90", "failed", ""):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for outcome in sorted(outcomes, key=lambda outcome: outcome.report.rate or 0.0):
        r = outcome.report
        low, high = r.interval.joint
        table.add_row(
            "-" if r.rate is None else f"{rounded(r.rate)}/s",
            f"{r.attainment.joint:.1%}",
            f"{low:.0%}-{high:.0%}",
            milliseconds(r.ttft.p50),
            milliseconds(r.ttft.p90),
            milliseconds(r.tpot.p50),
            milliseconds(r.tpot.p90),
            str(r.counted - r.completed - r.failed.get(UNFINISHED, 0)),
            "queues grow" if outcome.growing else "client too slow" if not outcome.kept_up else "",
        )
    return table


def goodput(found: Found, goal: float, devices: int | None, lowest: float | None, out: Console) -> None:
    """The answer of a sweep or a search. `lowest`: of the rates whose run came to its end; None: none did."""
    each = f", {rounded(found.rate / devices)} per device" if devices else ""
    none = (
        "not known: no run came to its end"
        if lowest is None
        else f"none: not even {rounded(lowest)} requests/s attain it"
    )
    answer = f"{rounded(found.rate)} requests/s{each}" if found.rate else none
    out.print(f"[bold]goodput[/bold] at {goal:.0%}: {answer}", highlight=False)
    low = f"at least {rounded(found.low)}" if found.low else "no rate attains it for sure (offer more, -n)"
    high = f"at most {rounded(found.high)} requests/s" if found.high is not None else "none was surely too high"
    out.print(f"{CONFIDENCE:.0%} sure: {low}, {high} ({found.why})", highlight=False)


def console(stderr: bool) -> Console:
    """Where reports go; wide enough for a table where it is no terminal."""
    found = Console(stderr=stderr, soft_wrap=True)
    return found if found.is_terminal else Console(stderr=stderr, soft_wrap=True, width=100)


def say(message: str) -> None:
    """A line of talk."""
    print(f"distserve: {message}", file=sys.stderr)
