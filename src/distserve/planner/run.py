"""`distserve plan`: reads what was given, chooses, tells and writes the answer."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from distserve import compiled, plots
from distserve.catalogue import model_spec
from distserve.cluster import LOCAL, Cluster
from distserve.costs.choose import choose_costs, measured_on
from distserve.errors import UsageError
from distserve.metrics import Targets
from distserve.outputs import check_writable, write_json, write_text
from distserve.planner import plot, show
from distserve.planner.answer import Answer, Dedicated
from distserve.planner.choose import Wish, choose
from distserve.planner.demand import Demand
from distserve.workload import Workload


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    model: str
    cluster: str
    workload: str
    slo: tuple[str, ...]
    rate: float | None = None
    devices: int | None = None
    attainment: float = 0.9
    algorithm: str = "auto"
    costs: str | None = None
    cv: float = 1.0
    seed: int = 0
    out: Path | None = None
    json_out: str | None = None
    plot: Path | None = None
    jobs: int | None = None


def run(options: Options) -> int:
    """The whole command; returns the exit status."""
    for option, path in (("--output", options.out), ("--json", options.json_out)):
        check_writable(option, path)
    plots.check("--plot", options.plot)
    cluster = Cluster.load(options.cluster)
    costs = choose_costs(options.model, cluster.device, options.costs, here=options.cluster == LOCAL or None)
    workload = Workload.load(options.workload).clipped(model_spec(options.model).max_model_len)
    demand = Demand(workload, Targets.parse(options.slo), options.attainment, options.cv, options.seed)
    wish = Wish(
        model=options.model,
        cluster=cluster,
        demand=demand,
        rate=options.rate,
        max_devices=options.devices,
        algorithm=options.algorithm,
        cluster_name=Path(options.cluster).name,
        jobs=_processes(options.jobs),
        curves=options.plot is not None,
    )
    if slow := compiled.notice():
        show.say(f"note: {slow}")
    try:
        with show.progress(f"choosing a plan for {options.model} on {wish.cluster_name}") as say:
            answer = choose(wish, costs, say)
    except KeyboardInterrupt:
        show.say("stopped: no plan was chosen")
        return 130
    console = Console(stderr=options.json_out == "-", soft_wrap=True)
    answers = {"": answer} if isinstance(answer, Answer) else answer.answers
    if isinstance(answer, Dedicated):
        show.show_dedicated(answer, console)
    for each in answers.values():
        show.show(each, console)
    _write(options, answer, answers)
    return 0


def _write(options: Options, answer: Answer | Dedicated, answers: dict[str, Answer]) -> None:
    for app, each in answers.items():
        if options.out is not None:
            file = _named(options.out, app)
            write_text(file, replace(each.plan, machine=measured_on(options.costs)).to_toml())
            show.say(f"wrote {file}")
        if options.plot is not None:
            file = _named(options.plot, app)
            plot.draw(each.curves, each.goal, f"{each.plan.model}, {each.workload}, SLO {each.targets}", file)
            show.say(f"wrote {file}")
    if options.json_out is not None:
        write_json(options.json_out, answer.to_dict())


def _named(path: Path, app: str) -> Path:
    """plan.toml, or plan.chat.toml for one of several applications."""
    return path.with_stem(f"{path.stem}.{app}") if app else path


def _processes(jobs: int | None) -> int:
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs} is too small: at least 1")
    return jobs or len(os.sched_getaffinity(0))
