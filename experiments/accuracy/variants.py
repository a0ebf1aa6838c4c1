"""The same runs with something changed: a mechanism left out, arrivals jittered, parameters fitted on other runs.
Knows no plot and no text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from distserve.costs.latency import Host
from distserve.costs.profile import Profile, ProfileCosts
from distserve.traces import Arrival
from distserve.workload import Workload
from experiments.accuracy.runs import MODEL, Run, real_runs
from experiments.accuracy.score import Score, mean_and_worst, score

JITTER = 0.004  # seconds, at most
SEEDS = 5
FITTED = ("distserve-c21d11-300-3", "distserve-c21d11-450-4.5", "distserve-c21d11-300-6")
UNTOUCHED = ("distserve-c21d11-300-9", "distserve-c21d11-900-9")
PER_STEP = tuple(i / 2000 for i in range(11))  # seconds
PER_SEQUENCE = tuple(i / 40000 for i in range(9))


def variant(costs_name: str, *, accounting: dict[str, Any] | None = None, **engine: Any) -> ProfileCosts:
    """Shipped costs with other values of the engine, or of what its memory is counted with."""
    profile = Profile.load(costs_name)
    contents = replace(
        profile.contents,
        engine=replace(profile.contents.engine, **engine),
        accounting=replace(profile.contents.accounting, **(accounting or {})),
    )
    return Profile(f"{costs_name} changed", contents).costs(MODEL)


@dataclass(frozen=True, slots=True)
class Without:
    """A mechanism left out, and what is missed then, over the runs of its engine."""

    what: str
    attainment: tuple[float, float]  # mean and worst error
    worst_medians: tuple[float, float]  # (TTFT, TPOT)


NO_HOST: dict[str, Any] = {"request": 0.0, "poll": 0.0, "prompt_step": Host(), "decode_step": Host()}
ENDLESS = {"utilization": 20.0}  # times the memory that there is
LEFT_OUT: dict[str, dict[str, dict[str, Any]]] = {
    "a100-80g": {
        "nothing: as shipped": {},
        "the end of KV memory (endless on both sides)": {"accounting": ENDLESS},
        "the swap (preempted KV is recomputed)": {"swap_bandwidth": None},
        "the stop of the decode loop while KV is pulled": {"pulls_stall": False},
        "all host time": NO_HOST,
        "micro-batches that keep their members (split evenly at each step)": {"micro_batches": "even"},
        "the hand-over between stages": {"handover": 0.0},
    },
    "a100-80g-vllm": {
        "nothing: as shipped": {},
        "the end of KV memory": {"accounting": ENDLESS},
        "the activations' reserve (KV takes all that is left)": {"accounting": {"activation": 0.01}},
        "padding of prompts to the longest": {"padded": False},
        "all host time": NO_HOST,
    },
}


def mechanisms(costs_name: str) -> list[Without]:
    """What each is worth: left out alone."""
    runs = [run for run in real_runs().values() if run.costs_name == costs_name]
    return [
        _without(what, [score(run, variant(costs_name, **changes)) for run in runs])
        for what, changes in LEFT_OUT[costs_name].items()
    ]


def _without(what: str, scores: Sequence[Score]) -> Without:
    ttft, tpot = ([found.median_errors()[i] for found in scores] for i in range(2))
    return Without(
        what,
        mean_and_worst(error for found in scores for error in found.errors()),
        (max(ttft, key=abs), max(tpot, key=abs)),
    )


def jittered(run: Run) -> list[Score]:
    """The run with arrivals moved by up to JITTER, each its own way, once a seed."""
    return [score(run, workload=_jitter(run.workload(), seed)) for seed in range(SEEDS)]


def _jitter(workload: Workload, seed: int) -> Workload:
    chance = random.Random(f"jitter {seed}")
    arrivals = sorted(r.arrival + chance.uniform(0, JITTER) for r in workload)
    moved = zip(arrivals, workload, strict=True)
    return replace(workload, arrivals=tuple(Arrival(t, r.prompt_tokens, r.output_tokens) for t, r in moved))


@dataclass(frozen=True, slots=True)
class Habits:
    """What one of the vLLMs behind the logs costs beside the device, in seconds."""

    runs: tuple[str, ...]  # that it served; they were fitted on
    request: float
    prompt: Host
    decode: Host
    per_context: float  # of a decode step, for each token of context

    def costs(self) -> ProfileCosts:
        """With the device as the authors measured it, nothing scaled."""
        shipped, raw = (Profile.load(name).contents for name in ("a100-80g-vllm", "a100-80g-vllm-raw"))
        entry = raw.entries[MODEL][1, None]
        decode = tuple(
            line._replace(per_context=line.per_context + self.per_context) for line in entry.coefficients.decode
        )
        contents = replace(
            raw,
            engine=replace(shipped.engine, request=self.request, prompt_step=self.prompt, decode_step=self.decode),
            accounting=replace(shipped.accounting, activation=ACTIVATION),
            entries={MODEL: {(1, None): replace(entry, coefficients=replace(entry.coefficients, decode=decode))}},
        )
        return Profile("a100-80g-vllm refitted", contents).costs(MODEL)


ACTIVATION = 0.103  # share of the memory; 56,496 tokens remain for KV
VLLMS = (
    Habits(("vllm-100-1", "vllm-300-3"), 0.007, Host(0.005, 17e-6), Host(0.004, 0.0, 225e-6), 0.26e-6),
    Habits(("vllm-200-2",), 0.012, Host(0.006, 32e-6), Host(0.009, 0.0, 225e-6), 0.26e-6),
)


@dataclass(frozen=True, slots=True)
class Fit:
    """Host time of decode steps, fitted on some runs."""

    on: tuple[str, ...]
    per_step: float
    per_sequence: float
    scores: tuple[Score, ...]  # with it, of FITTED and UNTOUCHED


def decode_host_fits() -> list[Fit]:
    """Fitted on all three runs of FITTED, then with each left out: smallest mean error of requests' TPOT on a grid."""
    runs = real_runs()
    grid = [Host(per_step, 0.0, per_sequence) for per_step, per_sequence in product(PER_STEP, PER_SEQUENCE)]
    errors = {
        host: {name: _pace_error(runs[name], variant("a100-80g", decode_step=host)) for name in FITTED} for host in grid
    }
    found = []
    for left_out in (None, *FITTED):
        on = tuple(name for name in FITTED if name != left_out)
        sums = {host: sum(errors[host][name] for name in on) for host in grid}
        best = min(grid, key=sums.__getitem__)
        costs = variant("a100-80g", decode_step=best)
        scores = tuple(score(runs[name], costs) for name in (*FITTED, *UNTOUCHED))
        found.append(Fit(on, best.per_step, best.per_sequence, scores))
    return found


def _pace_error(run: Run, costs: ProfileCosts) -> float:
    """Mean relative error of TPOT over requests with ten output tokens or more."""
    pairs = zip(run.simulate(costs).records, run.records, strict=True)
    errors = [
        abs(ours.tpot / real.tpot - 1) for ours, real in pairs if ours.tpot and real.tpot and real.output_tokens > 9
    ]
    return sum(errors) / len(errors)
