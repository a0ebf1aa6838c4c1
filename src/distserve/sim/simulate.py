"""A plan under a workload, imagined: values in, a report out. Knows no clock and no randomness but the workload's.

simulate(plan, workload, costs) -> Report            what a bench of the real thing would report
imagine(plan, workload, costs)  -> Imagination       the same, and every request and instance of it
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from distserve.cluster import Cluster
from distserve.costs.base import Costs, Weather
from distserve.errors import WorkloadError
from distserve.metrics import SLO, Record, Report, Targets, default_warmup, report
from distserve.plan import Plan
from distserve.sched.policy import AdmissionPolicy
from distserve.sim.instance import Trace
from distserve.sim.life import NEVER, Life, lives_of
from distserve.sim.usage import Usage
from distserve.sim.world import World
from distserve.workload import Workload

ANY = SLO()


@dataclass(frozen=True, slots=True)
class Split:
    """Where the mean request spends its time, in seconds. Colocated requests have no transfer."""

    queue: float  # until its prompt's first batch
    prefill: float  # until its first token
    transfer_wait: float  # until the decode side has room for it
    transfer: float  # the pull
    decode: float  # until its last token


@dataclass(frozen=True)
class Imagination:
    """A simulated run."""

    lives: tuple[Life, ...]  # in order of arrival
    end: float  # seconds; when the last request was over
    usage: dict[str, Usage]  # by instance
    notes: tuple[str, ...]  # what a reader should know, a sentence each

    @cached_property
    def records(self) -> tuple[Record, ...]:
        """In order of arrival."""
        return tuple([life.record() for life in self.lives])

    def split(self, warmup: float = 0.0) -> Split:
        """Of completed requests after the warm-up."""
        start = self.lives[0].arrival + warmup
        done = [life for life in self.lives if life.last < NEVER and life.arrival >= start]
        parts = [0.0] * 5
        for life in done:
            parts[0] += life.started - life.arrival
            parts[1] += life.first - life.started
            pulled = life.first
            if life.pulled < NEVER:
                pulled = life.pulled
                parts[2] += life.pull_started - life.first
                parts[3] += life.pulled - life.pull_started
            parts[4] += life.last - pulled
        return Split(*(part / max(1, len(done)) for part in parts))


def imagine(
    plan: Plan,
    workload: Workload,
    costs: Costs,
    *,
    cluster: Cluster | None = None,
    admission: AdmissionPolicy | None = None,
    trace: Trace | None = None,
    stop: Callable[[Life], bool] | None = None,
    weather: Mapping[str, Weather] | None = None,
    weather_at: float = 0.0,
) -> Imagination:
    """Lives every request of a workload that has arrival times. `cluster`: the links that KV moves over (None: nodes of
    eight devices as their vendor builds them). `admission`: what the gateway lets in. `trace` hears of every batch.
    `stop`, asked as each request ends, ends the run: requests that were not over are "unfinished". `weather`, by
    instance, takes the place of what the costs have seen, and of what neighbours do to each other. `weather_at`: the
    second of what the costs have seen at which the world begins.

    Raises `PlanError` where an instance does not fit its devices or nothing is known of its parallelism,
    `WorkloadError` where the workload has no times."""
    if not workload.timed:
        raise WorkloadError(f"{workload.name} has no arrival times: draw them with a rate")
    world = World(
        plan, costs, cluster=cluster, admission=admission, trace=trace, weather=weather, weather_at=weather_at
    )
    return _lived(world, lives_of(workload), stop)


def live(
    plan: Plan,
    lives: list[Life],
    costs: Costs,
    *,
    cluster: Cluster | None = None,
    admission: AdmissionPolicy | None = None,
    trace: Trace | None = None,
    stop: Callable[[Life], bool] | None = None,
) -> Imagination:
    """The same of lives that are about to begin, in order of arrival; they are lived."""
    return _lived(World(plan, costs, cluster=cluster, admission=admission, trace=trace), lives, stop)


def _lived(world: World, lives: list[Life], stop: Callable[[Life], bool] | None) -> Imagination:
    collects = gc.isenabled()
    gc.disable()  # nothing in a world need be looked for before its end, and looking took a twentieth of its time
    try:
        end = world.run(lives, stop)
    finally:
        if collects:
            gc.enable()
    return Imagination(
        lives=tuple(lives),
        end=end,
        usage={instance.name: instance.usage for instance in world.instances},
        notes=world.notes(),
    )


def simulate(
    plan: Plan,
    workload: Workload,
    costs: Costs,
    *,
    slo: SLO = ANY,
    cluster: Cluster | None = None,
    admission: AdmissionPolicy | None = None,
    warmup: float | None = None,
    seed: int | None = None,
) -> Report:
    """What `distserve bench` would report of the plan under the workload. `warmup`: seconds that count for nothing;
    None: a tenth of drawn arrivals, nothing of replayed ones. `seed` is only written into the report."""
    run = imagine(plan, workload, costs, cluster=cluster, admission=admission)
    return summarize(run, plan, workload, slo=slo, warmup=warmup, seed=seed)


def summarize(
    run: Imagination,
    plan: Plan,
    workload: Workload,
    *,
    slo: SLO = ANY,
    targets: Targets | None = None,
    warmup: float | None = None,
    seed: int | None = None,
) -> Report:
    """See `simulate`. `targets`: of several applications, in place of one SLO."""
    if warmup is None:
        warmup = default_warmup(workload.span) if workload.rate is not None else 0.0
    return report(
        run.records,
        targets.default if targets is not None else slo,
        end=run.end,
        rate=workload.rate,
        devices=plan.num_devices,
        warmup=warmup,
        seed=seed,
        targets=targets,
    )
