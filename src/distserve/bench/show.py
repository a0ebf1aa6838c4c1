"""What a person sees: a live table while the load runs, and the report after it. Only reads; measures nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from distserve.bench.load import Load
from distserve.metrics import SLO, Attainment, Report, Summary

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
            _ms(median([r.ttft for r in good if r.ttft is not None] or [float("nan")])),
            _ms(median([r.tpot for r in good if r.tpot is not None] or [float("nan")])),
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


def show_report(report: Report, title: str, goal: float | None, console: Console) -> None:
    """One run's report."""
    console.print(f"[bold]{title}[/bold]", highlight=False)
    attained, interval = report.attainment.joint, report.interval.joint
    sure = f"{report.interval.level:.0%} sure: {interval[0]:.1%} to {interval[1]:.1%}"
    verdict = "" if goal is None else f"; goal {goal:.0%} {'met' if attained >= goal else 'missed'}"
    rate = "-" if report.rate is None else f"{report.rate:.3g} requests/s"
    each = "" if report.rate_per_device is None else f", {report.rate_per_device:.3g} per device"
    done = {name: f"{value:.3g}" if value < 10 else f"{value:.0f}" for name, value in report.throughput.items()}
    tokens = f"{done['prompt_tokens']} prompt tokens/s, {done['output_tokens']} answer tokens/s"
    for name, text in (
        ("requests", _requests(report)),
        ("attainment", f"{attained:.1%} ({sure}){verdict}"),
        ("offered", f"{rate}{each}"),
        ("completed", f"{done['requests']} requests/s, {tokens}"),
    ):
        console.print(f"{name:<12}{text}", highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for column in ("", "mean", "p50", "p90", "p99", "target", "met"):
        table.add_column(column, justify="left" if not column else "right")
    _latency(table, "TTFT", report.ttft, report.slo.ttft, report.attainment.ttft)
    _latency(table, "TPOT", report.tpot, report.slo.tpot, report.attainment.tpot)
    for app, attainment in report.by_app.items():
        table.add_row(*_app(app, attainment))
    console.print(table, highlight=False)


def show_sweep(reports: Sequence[Report], goodput: float, goal: float, console: Console) -> None:
    """All rates of a sweep, a line each, and the goodput."""
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for column in ("rate", "attainment", "TTFT p50", "TTFT p90", "TPOT p50", "TPOT p90", "failed"):
        table.add_column(column, justify="right")
    for r in reports:
        table.add_row(
            "-" if r.rate is None else f"{r.rate:g}/s",
            f"{r.attainment.joint:.1%}",
            _ms(r.ttft.p50),
            _ms(r.ttft.p90),
            _ms(r.tpot.p50),
            _ms(r.tpot.p90),
            str(r.counted - r.completed),
        )
    console.print(table, highlight=False)
    answer = f"{goodput:g} requests/s" if goodput else "none of these rates"
    console.print(f"goodput at {goal:.0%}: {answer}", highlight=False)


def _requests(report: Report) -> str:
    text = f"{report.requests} offered in {report.duration:.1f} s"
    if report.counted != report.requests:
        text += f", {report.counted} counted (after {report.warmup:.1f} s of warm-up)"
    text += f", {report.completed} completed"
    failed = ", ".join(f"{count} {status}" for status, count in report.failed.items())
    return text + (f", failed: {failed}" if failed else "")


def _latency(table: Table, name: str, summary: Summary, target: float | None, met: float) -> None:
    values = (_ms(value) for value in (summary.mean, summary.p50, summary.p90, summary.p99))
    table.add_row(name, *values, _ms(target), "" if target is None else f"{met:.1%}")


def _app(name: str, attainment: Attainment) -> tuple[str, ...]:
    return (f"app {name}", "", "", "", "", "", f"{attainment.joint:.1%}")


def _ms(value: float | None) -> str:
    """Milliseconds, three digits; this edge is the only place that leaves seconds."""
    if value is None or value != value:
        return "-"
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value * 1000:.0f} ms"
