"""What nobody can know ahead: which weather falls on which run. Each run's requests are imagined in the weather of
other runs of the same plan; how far the answers lie apart is what the weather alone does to a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median

from distserve.costs.base import Costs
from distserve.metrics import Report, report
from distserve.sim.simulate import imagine
from distserve.validate.compare import STEEP
from distserve.validate.explain import weather
from distserve.validate.record import Key, Recording

DRAWS = 6  # other runs, whose weather each run is imagined in
LATENCIES = (("ttft", "p50"), ("ttft", "p90"), ("tpot", "p50"), ("tpot", "p90"))


@dataclass(frozen=True)
class Lots:
    """Mean absolute errors of who predicts the median of all draws, knowing all weather but not which run it falls on;
    and how far two draws lie apart."""

    attainment: float  # shares
    steep: float  # of cells between 5 and 95 %
    latencies: dict[tuple[str, str], float]  # relative
    apart: float
    steep_apart: float


def lots(recording: Recording, costs: Costs) -> Lots | None:
    """None: the server did not tell of its steps, or no plan has two runs."""
    runs = recording.runs
    known = {key: weather(run.steps, recording.served[key.plan], costs) for key, run in runs.items() if run.steps}
    errors: list[tuple[float, float]] = []  # (measured, predicted less measured)
    apart: list[tuple[float, float]] = []  # (measured, how far two draws lie apart)
    latencies: dict[tuple[str, str], list[float]] = {each: [] for each in LATENCIES}
    for key, run in runs.items():
        others = _others(key, list(known))
        if not others:
            continue
        drawn = [imagine(recording.served[key.plan], run.workload(), costs, weather=known[other]) for other in others]
        answers: list[Report] = []
        for slo in recording.chosen[key.plan, key.workload].slos:
            answers = [report(each.records, slo, end=each.end, rate=key.rate, warmup=run.warmup) for each in drawn]
            mine = report(run.records, slo, end=run.end, rate=key.rate, warmup=run.warmup)
            shares = [answer.attainment.joint for answer in answers]
            real = mine.attainment.joint
            errors.append((real, median(shares) - real))
            if len(shares) > 1:
                apart.append((real, fmean(abs(a - b) for a, b in combinations(shares, 2))))
        for name, part in LATENCIES:
            seen = _latency(mine, name, part)
            said = [value for answer in answers if (value := _latency(answer, name, part)) is not None]
            if seen and said:
                latencies[name, part].append(median(said) / seen - 1)
    if not errors or not apart:
        return None
    return Lots(
        _mean(errors),
        _mean(errors, steep=True),
        {each: fmean(map(abs, values)) for each, values in latencies.items() if values},
        _mean(apart),
        _mean(apart, steep=True),
    )


def _others(key: Key, keys: Sequence[Key]) -> list[Key]:
    """Runs of the same plan with other requests, evenly from all of the time that was measured."""
    found = [other for other in keys if other.plan == key.plan and other[:-1] != key[:-1]]
    number = min(DRAWS, len(found))
    return [found[i * len(found) // number] for i in range(number)]


def _latency(found: Report, name: str, part: str) -> float | None:
    value: float | None = getattr(getattr(found, name), part)
    return value


def _mean(values: Sequence[tuple[float, float]], *, steep: bool = False) -> float:
    """Of the second parts, without signs; of steep cells alone, nan where there are none."""
    chosen = [abs(value) for real, value in values if not steep or STEEP[0] <= real <= STEEP[1]]
    return fmean(chosen) if chosen else float("nan")
