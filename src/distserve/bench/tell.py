"""What a bench says at its end: reports on the terminal, files, and the exit status. Measures nothing."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console

from distserve import metrics
from distserve.bench import show
from distserve.bench.measure import Outcome
from distserve.bench.options import BenchOptions
from distserve.bench.search import Found, Search, Trial
from distserve.outputs import write_json, write_text
from distserve.tables import rounded, show_report
from distserve.workload import Workload


@dataclass(slots=True)
class Told:
    """All that a bench knows; grows while it runs."""

    options: BenchOptions
    workload: Workload
    goal: float
    model: str | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    search: Search | None = None  # --find-goodput
    interrupted: bool = False
    dead: bool = False  # the server no longer answers

    @property
    def several(self) -> bool:
        return self.search is not None or len(self.options.rates) > 1

    @property
    def found(self) -> Found:
        """The goodput among the rates that were measured."""
        if self.search is not None:
            return self.search.found
        search = Search(1.0, self.goal)
        for outcome in self.outcomes:
            if outcome.run.interrupted:
                continue  # how it would have ended nobody knows
            met = tuple(map(self.options.targets.met, outcome.counted))
            grows = 2.0 if outcome.growing else 1.0  # nobody measures it again at twice the length
            search.tell(Trial(outcome.report.rate or 0.0, met, outcome.growing, grows, outcome.kept_up))
        return replace(search.found, why="of the rates that were measured")

    def title(self, drawn: Workload) -> str:
        pace = f"at {drawn.rate:g} requests/s" if drawn.rate is not None else "replayed"
        return f"{drawn.name} {pace} on {self.options.url}" + (f" ({self.model})" if self.model else "")


def tell(told: Told) -> int:
    """Prints and writes what was measured; returns the exit status."""
    options = told.options
    if not told.outcomes:
        show.say("stopped before any request was over: nothing was measured")
        return 1 if told.dead else 130
    console = show.console(stderr=options.json_out == "-")
    for outcome in told.outcomes:
        at = f"at {rounded(outcome.report.rate)} requests/s: " if told.several and outcome.report.rate else ""
        for warning in outcome.warnings:
            show.say(f"warning: {at}{warning}")
        if not told.several:
            show_report(outcome.report, told.title(outcome.offer.workload), options.goal, console)
            _show_client(outcome, console)
    if told.several:
        name = replace(told.workload, rate=None).name
        console.print(f"[bold]{name} on {options.url}[/bold]", highlight=False)
        console.print(show.sweep(told.outcomes), highlight=False)
        whole = [outcome.report.rate or 0.0 for outcome in told.outcomes if not outcome.run.interrupted]
        show.goodput(told.found, told.goal, options.devices, min(whole, default=None), console)
    _write(told)
    return _status(told)


def _show_client(outcome: Outcome, console: Console) -> None:
    run = outcome.run
    cpu = f"{run.cpu / run.seconds:.1%} of a core" if run.seconds else "no time"
    verdict = "the bottleneck" if outcome.bottleneck else "not the bottleneck"
    console.print(f"{'client':<12}{cpu}, {verdict}", highlight=False)


def _status(told: Told) -> int:
    if told.interrupted:
        return 130
    if told.dead:
        show.say("error: the server no longer answers")
        return 1
    if not any(outcome.report.completed for outcome in told.outcomes):
        return 1
    if told.several:
        asked = told.search is not None or told.options.goal is not None
        return 1 if asked and not told.found.rate else 0
    missed = told.outcomes[0].report.attainment.joint < told.goal
    return 1 if told.options.goal is not None and missed else 0


def _write(told: Told) -> None:
    options = told.options
    if options.requests_out is not None:
        write_text(options.requests_out, _rows(told))
    if options.plot is not None:
        from distserve.bench.plot import draw

        rate = told.found.rate if told.several else None
        draw(told.outcomes, told.goal, rate, f"{told.workload.name} on {options.url}", options.plot)
    if options.json_out is not None:
        write_json(options.json_out, _json(told))


def _rows(told: Told) -> str:
    """A row for each request; several runs follow each other, told apart by a last column."""
    texts: list[str] = []
    for outcome in told.outcomes:
        text = io.StringIO()
        metrics.write_requests(outcome.records, text)
        head, *rows = text.getvalue().splitlines()
        if told.several:
            head, rows = f"{head},rate", [f"{row},{outcome.report.rate:g}" for row in rows]
        texts += rows if texts else [head, *rows]
    return "\n".join(texts) + "\n"


def _json(told: Told) -> dict[str, Any]:
    options = told.options
    about = {
        "workload": told.workload.name,
        "url": options.url,
        "model": told.model,
        "endpoint": options.endpoint,
    }
    runs = [{**outcome.to_dict(), **about} for outcome in told.outcomes]
    if not told.several:
        return runs[0]
    found = told.found
    return {
        "runs": runs,
        "goal": told.goal,
        "goodput": found.rate,
        "goodput_interval": [found.low, found.high],
        "goodput_per_device": found.rate / options.devices if options.devices else None,
        "slo": asdict(options.targets),
        "ended": found.why,
        "interrupted": told.interrupted,
    }
