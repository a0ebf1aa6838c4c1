"""`distserve plan`: reads what was given, chooses, tells and writes the answer."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from distserve.catalogue import model_spec
from distserve.cluster import Cluster
from distserve.costs.choose import choose_costs
from distserve.errors import UsageError
from distserve.metrics import Targets
from distserve.planner import show
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
    for option, path in (("--output", options.out), ("--json", options.json_out), ("--plot", options.plot)):
        _check_writable(option, path)
    cluster = Cluster.load(options.cluster)
    costs = choose_costs(options.model, cluster.device, options.costs)
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
    )
    try:
        with show.progress() as say:
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
    try:
        if options.out is not None:
            for app, each in answers.items():
                file = options.out.with_stem(f"{options.out.stem}.{app}") if app else options.out
                file.write_text(each.plan.to_toml(), encoding="utf-8")
                show.say(f"wrote {file}")
        if options.json_out is not None:
            text = json.dumps(answer.to_dict(), indent=2, allow_nan=False) + "\n"
            if options.json_out == "-":
                sys.stdout.write(text)
            else:
                Path(options.json_out).write_text(text, encoding="utf-8")
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(f"cannot write {error.filename}: {error.strerror}") from None


def _processes(jobs: int | None) -> int:
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs} is too small: at least 1")
    return jobs or len(os.sched_getaffinity(0))


def _check_writable(option: str, path: Path | str | None) -> None:
    """Refuses before the search what would only fail after it."""
    if path is None or path == "-":
        return
    folder = Path(path).parent
    target = Path(path) if Path(path).exists() else folder
    if not folder.is_dir() or Path(path).is_dir() or not os.access(target, os.W_OK):
        raise UsageError(f"{option} {path}: cannot be written: name a file in a folder that is yours to write")
