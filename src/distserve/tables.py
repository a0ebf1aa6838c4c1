"""Reports as a person reads them: tables on a terminal. The only place that leaves seconds for milliseconds."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from distserve.metrics import Attainment, Report, Summary


def show_report(report: Report, title: str, goal: float | None, console: Console) -> None:
    """One run's report."""
    console.print(f"[bold]{title}[/bold]", highlight=False)
    attained, interval = report.attainment.joint, report.interval.joint
    sure = f"{report.interval.level:.0%} sure: {interval[0]:.1%} to {interval[1]:.1%}"
    verdict = "" if goal is None else f"; goal {goal:.0%} {'met' if attained >= goal else 'missed'}"
    rate = "-" if report.rate is None else f"{rounded(report.rate)} requests/s"
    each = "" if report.rate_per_device is None else f", {rounded(report.rate_per_device)} per device"
    done = {name: rounded(value) if value < 10 else f"{value:.0f}" for name, value in report.throughput.items()}
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
    latency_row(table, "TTFT", report.ttft, report.slo.ttft, report.attainment.ttft)
    latency_row(table, "TPOT", report.tpot, report.slo.tpot, report.attainment.tpot)
    for app, attainment in report.by_app.items():
        table.add_row(*_app(app, attainment))
    console.print(table, highlight=False)


def _requests(report: Report) -> str:
    text = f"{report.requests} offered in {report.duration:.1f} s"
    if report.counted != report.requests:
        text += f", {report.counted} counted (after {report.warmup:.1f} s of warm-up)"
    text += f", {report.completed} completed"
    failed = ", ".join(f"{count} {status}" for status, count in report.failed.items())
    return text + (f", failed: {failed}" if failed else "")


def latency_row(table: Table, name: str, summary: Summary, target: float | None, met: float) -> None:
    """Mean, p50, p90, p99, the target and the share that met it."""
    values = (milliseconds(value) for value in (summary.mean, summary.p50, summary.p90, summary.p99))
    table.add_row(name, *values, milliseconds(target), "" if target is None else f"{met:.1%}")


def _app(name: str, attainment: Attainment) -> tuple[str, ...]:
    return (f"app {name}", "", "", "", "", "", f"{attainment.joint:.1%}")


def rounded(value: float) -> str:
    """A number a person reads: three digits, and no exponent where it is large."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def milliseconds(value: float | None) -> str:
    """Milliseconds, three digits."""
    if value is None or value != value:
        return "-"
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value * 1000:.0f} ms"
