"""What a person sees: where the search is, and the answer. Only reads; chooses nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from distserve.planner.answer import Alternative, Answer, Dedicated
from distserve.tables import latency_row, milliseconds


def say(message: str) -> None:
    """A line of talk."""
    print(f"distserve: {message}", file=sys.stderr)


@contextmanager
def progress(title: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is looked at, where that is a terminal; else only that there is something."""
    console = Console(stderr=True)
    if not console.is_terminal:
        began = False

        def once(_: str) -> None:
            nonlocal began
            if not began:
                say(title)
            began = True

        yield once
        return
    columns = TextColumn(title), BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task("", total=None)  # nobody knows how many deployments there are to look at
        yield lambda text: bar.update(task, description=text)


def show_dedicated(answer: Dedicated, console: Console) -> None:
    """What stands above the answers for each application."""
    other = _alternative(answer.shared) if answer.shared else "does not attain the goals"
    console.print(f"[bold]A plan for each application: {answer.num_devices} devices[/bold]", highlight=False)
    console.print(f"shared      {other}\n", highlight=False)


def show(answer: Answer, console: Console) -> None:
    """One answer."""
    title = f"{answer.plan.model} on {answer.cluster}, {answer.workload}"
    console.print(f"[bold]{title}[/bold]", highlight=False)
    for name, text in _lines(answer):
        console.print(f"{name:<12}{text}", highlight=False)
    console.print(_latencies(answer), highlight=False)
    console.print(_seats(answer), highlight=False)
    for note in answer.notes:
        console.print(f"note: {note}", highlight=False, style="dim")


def _lines(answer: Answer) -> Iterator[tuple[str, str]]:
    goodput, report = answer.goodput, answer.report
    yield "plan", f"{describe(answer)}, {_devices(answer.num_devices)}"
    sure = f"95% sure: {goodput.low:.3g} to {goodput.high:.3g}"
    each = f"{answer.goodput_per_device:.3g} per device, at a goal of {answer.goal:.0%}"
    yield "goodput", f"{goodput.rate:.3g} requests/s ({sure}), {each}"
    rate = f"at {answer.rate or report.rate:.4g} requests/s"
    low, high = report.interval.joint
    yield "attainment", f"{report.attainment.joint:.1%} {rate} (95% sure: {low:.1%} to {high:.1%})"
    busy = ", ".join(f"{role} {share:.0%} busy" for role, share in answer.utilization.items())
    yield "bottleneck", f"{answer.bottleneck}: beyond the goodput {answer.binding.upper()} is missed first ({busy})"
    if answer.runner_up:
        yield "runner-up", _alternative(answer.runner_up)
    if answer.other_kind:
        yield "apart" if answer.ratio is None else "colocated", _alternative(answer.other_kind)
    yield "search", f"{answer.simulated:,} requests simulated in {answer.seconds:.1f} s; costs {answer.costs}"


def describe(answer: Answer) -> str:
    parts = []
    for spec in answer.plan.instances:
        pp = f" pp{spec.pp}" if spec.pp > 1 else ""
        policy = f" ({spec.policy})" if spec.policy else ""
        parts.append(f"{spec.count} {spec.role} tp{spec.tp}{pp}{policy}")
    return " + ".join(parts)


def _devices(number: int) -> str:
    return f"{number} device{'s' if number > 1 else ''}"


def _alternative(other: Alternative) -> str:
    return f"{other.description}, {_devices(other.devices)}: {other.loses}"


def _latencies(answer: Answer) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for column in ("", "mean", "p50", "p90", "p99", "target", "met"):
        table.add_column(column, justify="left" if not column else "right")
    report = answer.report
    for name, summary, target, met in (
        ("TTFT", report.ttft, report.slo.ttft, report.attainment.ttft),
        ("TPOT", report.tpot, report.slo.tpot, report.attainment.tpot),
    ):
        latency_row(table, name, summary, target, met)
    for app, attainment in report.by_app.items():
        slo = answer.targets.of(app)
        table.add_row(f"app {app}", "", "", "", "", str(slo), f"{attainment.joint:.1%}")
    split = answer.split
    for name, value in (
        ("queue", split.queue),
        ("prefill", split.prefill),
        ("pull waits", split.transfer_wait),
        ("pull", split.transfer),
        ("decode", split.decode),
    ):
        table.add_row(name, milliseconds(value))
    return table


def _seats(answer: Answer) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for column in ("instance", "tp", "pp", "devices"):
        table.add_column(column)
    for replica in answer.plan.replicas():
        stages = [
            " ".join(replica.devices[stage * replica.spec.tp : (stage + 1) * replica.spec.tp])
            for stage in range(replica.spec.pp)
        ]
        table.add_row(replica.name, str(replica.spec.tp), str(replica.spec.pp), " | ".join(stages))
    return table
