"""Every one of ours in the weather of every run: on a machine that is two to three times as slow for seconds at a time,
who was measured when decides as much as who is better. The simulator, which is held against these very runs (page.py),
lives each contender's requests through what the colocated runs saw of the machine, and all of that is judged together.
"""

from __future__ import annotations

from distserve.costs.base import Costs, Weather
from distserve.plan import Plan
from distserve.sim.simulate import imagine
from distserve.validate.explain import weather
from distserve.validate.record import Measured, Recording
from experiments.live_goodput.cases import Case
from experiments.live_goodput.contenders import CHUNKED, OURS, WHOLE, label
from experiments.live_goodput.results import Row, rows


def in_the_same_weather(case: Case, recording: Recording, costs: Costs) -> list[Row]:
    """Simulated rows, of contenders and rates that were measured; none where no colocated run kept its steps."""
    found = rows(case, recording)
    seen = weathers(case, recording, costs)
    if not seen:
        return []
    asked = {run.key.rate: run for row in found for run in row.runs}
    return [
        Row(
            case,
            row.contender,
            tuple(
                _lived(run, recording.served[label(row.contender, case)], costs, seen)
                for _, run in sorted(asked.items())
            ),
        )
        for row in found
        if row.contender in OURS
    ]


def weathers(case: Case, recording: Recording, costs: Costs) -> list[tuple[Weather, ...]]:
    """By run, of each core. Only instances that do both know both of its paces."""
    found = []
    for row in rows(case, recording):
        if row.contender in (WHOLE, CHUNKED) and any(run.steps for run in row.runs):
            plan = recording.served[label(row.contender, case)]
            for run in row.runs:
                if run.steps:
                    of_run = weather(run.steps, plan, costs)
                    found.append(tuple(of_run[replica.name] for replica in plan.replicas()))
    return found


def _lived(run: Measured, plan: Plan, costs: Costs, seen: list[tuple[Weather, ...]]) -> Measured:
    """The requests of a run, in all of these weathers one after the other."""
    names = [replica.name for replica in plan.replicas()]
    lives = [imagine(plan, run.workload(), costs, weather=dict(zip(names, each, strict=True))) for each in seen]
    records = [record for life in lives for record in life.records]
    return Measured(run.key, run.warmup, max(life.end for life in lives), tuple(records))
