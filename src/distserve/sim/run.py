"""`distserve simulate`: reads what was given, imagines it, tells and writes what came of it."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from distserve import compiled, metrics, plots, steady
from distserve.cluster import LOCAL, Cluster
from distserve.costs.base import Costs
from distserve.costs.choose import choose_costs
from distserve.errors import UsageError
from distserve.metrics import Report, Targets
from distserve.outputs import check_writable, write_json, write_text
from distserve.plan import Plan
from distserve.sim.simulate import Imagination, imagine, summarize
from distserve.tables import milliseconds, show_report
from distserve.workload import Workload

ENOUGH = 1000  # requests of a drawn run, at least
SPAN = 300.0  # seconds of it


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    plan: Path
    workload: str = "sharegpt"
    rate: float | None = None
    cv: float = 1.0
    requests: int | None = None
    seed: int = 0
    slo: tuple[str, ...] = ()
    goal: float | None = None
    warmup: float | None = None
    model: str | None = None
    device: str | None = None
    costs: str | None = None
    cluster: str | None = None
    json_out: str | None = None
    requests_out: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        if self.requests is not None and self.requests < 1:
            raise UsageError(f"--requests {self.requests} is too small: at least 1")
        if self.goal is not None and not 0 < self.goal <= 1:
            raise UsageError(f"--goal {self.goal:g} must be a share above 0 and at most 1, such as 0.9")
        if self.warmup is not None and not (math.isfinite(self.warmup) and self.warmup >= 0):
            raise UsageError(f"--warmup {self.warmup:g} must be 0 seconds or more")


def run(options: Options) -> int:
    """The whole command; returns the exit status."""
    for option, path in (("--json", options.json_out), ("--requests-out", options.requests_out)):
        check_writable(option, path)
    plots.check("--plot", options.plot)
    plan = Plan.load(options.plan)
    cluster = Cluster.load(options.cluster) if options.cluster is not None else None
    costs = _costs(options, plan, cluster)
    targets = Targets.parse(options.slo)
    workload = _workload(options, costs.spec.max_model_len)
    found = imagine(plan, workload, costs, cluster=cluster)
    report = summarize(
        found,
        plan,
        workload,
        targets=targets,
        warmup=options.warmup,
        seed=options.seed if workload.rate is not None else None,
    )
    notes = [*workload.notes, *found.notes, *_unsteady(found, targets, report.warmup)]
    slow = compiled.notice()
    for note in [*notes, slow] if slow else notes:
        print(f"distserve: note: {note}", file=sys.stderr)
    console = Console(stderr=options.json_out == "-", soft_wrap=True)
    show_report(report, _title(workload, costs), options.goal, console)
    _show_instances(found, console)
    _write(options, found, report, costs, notes)
    return 1 if options.goal is not None and report.attainment.joint < options.goal else 0


def _costs(options: Options, plan: Plan, cluster: Cluster | None) -> Costs:
    model = options.model or plan.model
    if model is None:
        raise UsageError(f'{options.plan} names no model: add model = "..." to it, or give --model')
    device = options.device or (cluster.device if cluster is not None else plan.device)
    if device is None and options.costs is None:
        raise UsageError(f'{options.plan} names no device: add device = "a100-80g" or so to it, or give --device')
    return choose_costs(model, device, options.costs, here=options.cluster == LOCAL or None)


def _workload(options: Options, context: int) -> Workload:
    workload = Workload.load(options.workload)
    if options.rate is not None:
        requests = options.requests or max(ENOUGH, math.ceil(SPAN * options.rate))
        workload = workload.draw(options.rate, requests, seed=options.seed, cv=options.cv)
    elif not workload.timed:
        raise UsageError(f"{workload.name} has no arrival times: give --rate R (requests a second)")
    elif options.requests is not None:
        workload = workload.head(options.requests)
    if options.warmup is not None and options.warmup > workload.span:
        raise UsageError(
            f"--warmup {options.warmup:g} is longer than the arrivals, {workload.span:g} s: lower it, or simulate more"
        )
    return workload.clipped(context)


def _unsteady(found: Imagination, targets: Targets, warmup: float) -> list[str]:
    """Says so where the second half of the run did not do as the first."""
    start = found.records[0].arrival + warmup
    falling = steady.falling([targets.met(record) for record in found.records if record.arrival >= start])
    more = "its queues have not settled; give more requests (-n) for a steady state, if there is one at this rate"
    return [f"{falling}: {more}"] if falling else []


def _title(workload: Workload, costs: Costs) -> str:
    pace = f"at {workload.rate:g} requests/s" if workload.rate is not None else "replayed"
    return f"{workload.name} {pace}, simulated with the costs {costs.name}"


def _show_instances(found: Imagination, console: Console) -> None:
    """How busy each was, and where the mean request spent its time."""
    for name, usage in found.usage.items():
        share = usage.busy / found.end if found.end else 0.0
        console.print(f"{name:<12}{share:.0%} busy, {usage.batch} decoding at most", highlight=False)
    parts = ", ".join(
        f"{name.replace('_', ' ')} {milliseconds(value)}" for name, value in asdict(found.split()).items()
    )
    console.print(f"{'mean time':<12}{parts}", highlight=False)


def _write(options: Options, found: Imagination, report: Report, costs: Costs, notes: list[str]) -> None:
    if options.requests_out is not None:
        text = io.StringIO()
        metrics.write_requests(found.records, text)
        write_text(options.requests_out, text.getvalue())
    if options.plot is not None:
        from distserve.sim.plot import draw

        draw(found, report, options.plot)
    if options.json_out is not None:
        whole: dict[str, Any] = {
            **report.to_dict(),
            "workload": options.workload,
            "costs": costs.name,
            "split": asdict(found.split(report.warmup)),
            "instances": {
                name: {"busy": usage.busy / found.end if found.end else 0.0, "steps": usage.steps}
                for name, usage in found.usage.items()
            },
            "notes": notes,
        }
        write_json(options.json_out, whole)
