"""What a person sees: a live table while the load runs, and the report after it. Only reads; measures nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from distserve.bench.load import Load
from distserve.metrics import SLO
from distserve.tables import milliseconds

_RECENT = 500  # requests that the live figures look at
_REFRESH = 2.0  # times a second; a refresh takes a few ms, in which no byte is read


class _Board:
    """The live table; rich asks for it anew at each refresh."""

    def __init__(self, load: Load, slo: SLO, title: str) -> None:
        self._load = load
        self._slo = slo
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task = self._bar.add_task(title, total=load.total)

    def __rich__(self) -> Group:
        run = self._load.run
        recent = [result.record for result in run.results[-_RECENT:]]
        good = [record for record in recent if record.ok]
        self._bar.update(self._task, completed=len(run.results))
        table = Table.grid(padding=(0, 3))
        failed = sum(not result.record.ok for result in run.results)
        table.add_row("in flight", "failed", "TTFT p50", "TPOT p50", "targets met", style="dim")
        table.add_row(
            str(run.in_flight),
            str(failed),
            milliseconds(median([r.ttft for r in good if r.ttft is not None] or [float("nan")])),
            milliseconds(median([r.tpot for r in good if r.tpot is not None] or [float("nan")])),
            f"{sum(map(self._slo.met, recent)) / len(recent):.1%}" if recent else "-",
        )
        return Group(self._bar, table)


@contextmanager
def live(load: Load, slo: SLO, title: str) -> Iterator[None]:
    """Shows the load's progress on stderr, where that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"distserve: {title}: {load.total} requests", file=sys.stderr)
        yield
        return
    board = _Board(load, slo, title)
    with Live(get_renderable=board.__rich__, console=console, refresh_per_second=_REFRESH, transient=True):
        yield


def say(message: str) -> None:
    """A line of talk."""
    print(f"distserve: {message}", file=sys.stderr)
