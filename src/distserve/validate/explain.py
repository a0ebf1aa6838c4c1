"""Where a prediction's error comes from: the steps themselves, or what is made of them.

The server tells of each step what it computed and how long that took (`serve --record-steps`), or at least the sums by
role (/metrics). Beside what the costs say they tell how fast the machine was, moment by moment, during that very run;
and where the run is imagined once more on such a machine, what error is left is that of queues, batches, pulls, gateway
and client. Knows no server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distserve.costs.base import Costs, Pace, Weather
from distserve.costs.latency import Latency
from distserve.plan import Plan, Role
from distserve.sim.simulate import Imagination, imagine
from distserve.validate.record import Measured
from distserve.validate.steps import Step, Steps

STEP = "distserve:step_seconds"
_TIMES = 3  # that factors are found anew: longer steps make larger batches


@dataclass(frozen=True, slots=True)
class Mean:
    """Of the steps of one role."""

    measured: float  # seconds of the mean step
    predicted: float

    @property
    def ratio(self) -> float:
        """How many times as long as predicted they took."""
        return self.measured / self.predicted


def steps(run: Measured, imagined: Sequence[Imagination]) -> dict[str, Mean]:
    """By role, of those that both worlds have steps of. `imagined`: the run, as often as it was."""
    found = {}
    for role in map(str, Role):
        count = run.server.get(f"{STEP} {role} count", 0.0)
        mine = [usage for each in imagined for name, usage in each.usage.items() if name.startswith(role)]
        number = sum(usage.steps for usage in mine)
        if count and number:
            busy = sum(usage.busy for usage in mine)
            found[role] = Mean(run.server[f"{STEP} {role} sum"] / count, busy / number)
    return found


def as_measured(run: Measured, plan: Plan, costs: Costs) -> Imagination | None:
    """The run imagined on a machine as fast, at each moment, as its own was; where only the sums of the steps are
    known, as fast as it was on average, by role. None: the server did not tell."""
    if run.steps:
        return imagine(plan, run.workload(), costs, weather=weather(run.steps, plan, costs))
    factors: dict[str, float] = {}
    imagined = imagine(plan, run.workload(), costs)
    for _ in range(_TIMES):
        found = steps(run, (imagined,))
        if not found:
            return None
        factors = {role: factors.get(role, 1.0) * each.ratio for role, each in found.items()}
        always = {
            replica.name: Weather((Pace(0.0, *[factors.get(replica.role, 1.0)] * 2),)) for replica in plan.replicas()
        }
        imagined = imagine(plan, run.workload(), costs, weather=always)
    return imagined


def weather(known: Steps, plan: Plan, costs: Costs) -> dict[str, Weather]:
    """Of each instance: how many times as long as its costs say its steps took. An imagined step is as slow as the
    measured one of its kind that is nearest to it in time: half of what lies between two belongs to each."""
    found = {}
    for name, steps_of in slowness(known, plan, costs).items():
        changes: list[tuple[float, bool, float]] = []  # (second, prompts, times as long from then on)
        for prompts in (True, False):
            end = 0.0  # of the step before
            for step, times in sorted(each for each in steps_of if bool(each[0].prompt_tokens) == prompts):
                changes.append(((end + step.began) / 2 if end else 0.0, prompts, times))
                end = step.began + step.seconds
        paces = [Pace(0.0, 1.0, 1.0)]
        for at, prompts, times in sorted(changes):
            last = paces[-1]
            pace = Pace(max(at, last.at), *((times, last.decodes) if prompts else (last.prompts, times)))
            if pace.at == last.at:
                paces.pop()
            paces.append(pace)
        found[name] = Weather(tuple(paces))
    return found


def slowness(known: Steps, plan: Plan, costs: Costs) -> dict[str, list[tuple[Step, float]]]:
    """By instance of the plan: each of its steps, and how many times as long as its costs say it took."""
    found = {}
    for replica in plan.replicas():
        latency = costs.latency(replica.spec.tp, replica.spec.pp)
        found[replica.name] = [(step, step.seconds / expected(latency, step)) for step in known.get(replica.name, ())]
    return found


def expected(latency: Latency, step: Step) -> float:
    """Seconds of the device, by its costs; of all stages one after the other."""
    coefficients, pp = latency.coefficients, latency.pp
    if not step.prompt_tokens:
        seconds = coefficients.decodes(step.sequences, step.context)
    elif step.sequences:
        seconds = coefficients.mixed(step.prompt_tokens, step.prompt_squares, step.sequences, step.context)
    else:
        seconds = coefficients.prompts(step.prompt_tokens, step.prompt_squares)
    return pp * (seconds * latency.share + latency.handover) if pp > 1 else seconds
