"""One simulated run as arrays, and how long runs are. Knows a system and a rate, no figure.

    as published   as many requests as the paper sent (25 to 100 a device), all of them count: queues have no time to
                   fill, nor does the KV memory. Several draws of the same length: their mean, and how far one draw goes
    steady         thousands of requests; the first tenth (filling) and the last twentieth (draining) do not count

Draws are common: the same seed gives the same lengths at every rate and to every system, at gaps that differ by the
factor of the rates only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from distserve.metrics import SLO, proportion_interval
from distserve.sched.policy import AdmissionPolicy
from distserve.sim.life import NEVER, Life
from distserve.sim.simulate import imagine
from distserve.workload import Workload
from experiments.paper.systems import CLUSTER, System

# Neither DistServe nor vLLM refused anybody.
OPEN = AdmissionPolicy(max_requests=1 << 40, max_queued_tokens=1 << 60, max_wait=math.inf)
STAGES = ("prefill_queuing", "prefill_execution", "transmission", "decode_queuing", "decode_execution")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Length:
    """What is drawn and what of it counts."""

    name: str
    requests: int
    seeds: int = 1
    first: float = 0.0  # share of the arrivals before those that count
    last: float = 1.0
    fine: float = 1.04  # a crossing is searched between two rates no further apart


def as_published(system: System, per_device: int, *, quick: bool = False) -> Length:
    if quick:
        return Length("as published", 40, 2, fine=2.0)
    return Length("as published", per_device * system.devices, 5)


def steady(*, quick: bool = False) -> Length:
    """Long enough for the KV memory to fill: an answer takes 10 to 40 s."""
    if quick:
        return Length("steady", 60, 1, 0.1, 0.95, fine=2.0)
    return Length("steady", 2500, 1, 0.1, 0.95)


@dataclass(frozen=True)
class Sample:
    """Requests that count, in order of arrival; of several draws one after the other. Seconds; what never came:
    infinite. An answer of one token has a TPOT of 0."""

    ttft: Floats
    tpot: Floats
    draws: int = 1

    def met(self, slo: SLO) -> NDArray[np.bool_]:
        return self.needed(slo) <= 1.0

    def needed(self, slo: SLO) -> Floats:
        """The smallest factor on both targets with which each request meets them."""
        assert slo.ttft is not None
        assert slo.tpot is not None
        return np.maximum(self.ttft / slo.ttft, self.tpot / slo.tpot)

    def interval(self, slo: SLO) -> tuple[float, float]:
        return proportion_interval(self.met(slo).tolist())

    def by_draw(self, slo: SLO) -> list[float]:
        """Attainment of each draw."""
        return [float(part.mean()) for part in np.array_split(self.met(slo), self.draws)]

    def grows(self, slo: SLO) -> bool:
        """Whether those that come late need much longer targets than those before: there is no steady state, or it
        comes later."""
        needed = self.needed(slo)
        if not np.isfinite(needed).all():
            return True
        thirds = [np.array_split(draw, 3) for draw in np.array_split(needed, self.draws)]
        early, late = (float(np.mean(np.concatenate([draw[at] for draw in thirds]))) for at in (0, 2))
        return late > 1.5 * early


@cache
def workload(name: str) -> Workload:
    return Workload.load(name)


def lives(system: System, lengths: Workload, rate: float, requests: int, seed: int) -> tuple[Life, ...]:
    """`rate`: of the whole plan."""
    drawn = lengths.draw(rate, requests, seed=seed)
    return imagine(system.plan, drawn, system.costs(), cluster=CLUSTER, admission=OPEN).lives


def sample(system: System, lengths: Workload | str, rate: float, length: Length) -> Sample:
    """`rate`: requests/s and device."""
    if isinstance(lengths, str):
        lengths = workload(lengths)
    ttft: list[float] = []
    tpot: list[float] = []
    for seed in range(length.seeds):
        all_lives = lives(system, lengths, rate * system.devices, length.requests, seed)
        counted = all_lives[int(length.first * len(all_lives)) : math.ceil(length.last * len(all_lives))]
        for record in (life.record() for life in counted):
            ttft.append(NEVER if record.ttft is None or not record.ok else record.ttft)
            tpot.append((record.tpot or 0.0) if record.ok else NEVER)
    return Sample(np.array(ttft), np.array(tpot), length.seeds)


def shares(found: tuple[Life, ...]) -> list[float]:
    """Share of each of `STAGES` in a request's latency, the mean over requests (as the paper's figure 10 has it)."""
    total = np.zeros(len(STAGES))
    done = [life for life in found if life.last < NEVER]
    for life in done:
        pulled = life.pulled < NEVER  # an answer of one token is over without
        stages = (
            life.started - life.arrival,
            life.first - life.started,
            life.pulled - life.pull_started if pulled else 0.0,
            life.pull_started - life.first if pulled else 0.0,
            life.last - life.pulled if pulled else 0.0,
        )
        total += np.array(stages) / (life.last - life.arrival)
    return [float(part) for part in total / max(1, len(done))]


def pulls(found: tuple[Life, ...]) -> Floats:
    """Seconds of each pull, ascending."""
    return np.array(sorted(life.pulled - life.pull_started for life in found if life.pulled < NEVER))
