"""From findings to a costs file (docs/reference/costs.md): the fit with its error, the engine's habits, the machine.
Knows no worker and no clock.

    request, host     straight lines through what was measured at two sizes or more, no part below 0; a turn of an
                      instance around its step costs the same whatever is in the step
    publish           a straight line through its sizes
    pull              the bandwidth from large pulls less small ones, publishing included, for it is waited for, too;
                      what is left of a short prompt's hand-off through the gateway is its fixed part
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from distserve.costs import format
from distserve.costs.fit import FEWEST
from distserve.metrics import quantile
from distserve.profiler import weather
from distserve.profiler.phases import Findings
from distserve.profiler.series import Series

QUICK = 0.1  # of all steps


@dataclass(frozen=True, slots=True)
class Heading:
    """What a file says of itself."""

    device: str
    dtype: str
    date: str
    source: str
    model: str
    degree: str  # "2x4": tp 2 in 4 stages
    fingerprint: str
    versions: str
    memory: int  # bytes of a device
    block_size: int
    token_bytes: int  # of KV
    kv_memory: int | None  # bytes an instance's device gives to KV


def missing(found: Findings) -> str:
    """What a fit lacks, in words; empty where it can be made."""
    lacks = [
        f"{FEWEST - len(points)} more steps {what}"
        for what, points in (("with prompts", found.prompts), ("that decode", found.decodes))
        if len(points) < FEWEST
    ]
    return " and ".join(lacks)


def table(found: Findings, heading: Heading) -> dict[str, Any]:
    """The file as JSON values. Raises `UsageError` where a fit cannot be made."""
    entry = format.fitted(found.prompt_points, found.decode_points, found.mixed_points)
    bandwidth, pull = pulls(found, heading)
    publish, per_byte = line({size: series.seconds for size, series in found.publish.items()})
    request, per_token = line({n: s.seconds for n, s in found.around.request.items()})
    per_step, per_sequence = line({n: s.seconds for n, s in found.around.host.items()})
    engine: dict[str, Any] = {
        "request": max(0.0, request - per_step),  # a first token waits for the turn around its step, too
        "prompt_step": {"per_step": per_step, "per_token": per_token, "per_sequence": per_sequence},
        "decode_step": {"per_step": per_step, "per_sequence": per_sequence},
        "publish": publish,
        "publish_bandwidth": 1 / per_byte if per_byte else None,
        "pull": pull,
        "pull_bandwidth": bandwidth,
        "block_size": heading.block_size,
        "kv_memory": heading.kv_memory,
        **beside(found),
    }
    machine: dict[str, Any] = {
        "fingerprint": heading.fingerprint,
        "versions": heading.versions,
        "memory": heading.memory,
        "link_bandwidth": bandwidth,
    }
    found_weather = weather.watched(found)
    return {
        "format": format.FORMAT,
        "device": heading.device,
        "dtype": heading.dtype,
        "date": heading.date,
        "source": heading.source,
        "note": note(found),
        "machine": {key: value for key, value in machine.items() if value is not None},
        "engine": {key: _rounded(value) for key, value in engine.items() if value is not None},
        **({"weather": found_weather} if found_weather else {}),
        "models": {heading.model: {heading.degree: _rounded(entry)}},
    }


def line(points: Mapping[int, float]) -> tuple[float, float]:
    """(at 0, slope) of the straight line closest to the points, neither below 0; nothing of no points."""
    if not points:
        return 0.0, 0.0
    x, y = fmean(points), fmean(points.values())
    spread = sum((each - x) ** 2 for each in points)
    slope = sum((each - x) * (points[each] - y) for each in points) / spread if spread else 0.0
    slope = max(0.0, slope)
    start = y - slope * x
    if start < 0:
        squares = sum(each * each for each in points)
        return 0.0, max(0.0, sum(each * points[each] for each in points) / squares)
    return start, slope


def pulls(found: Findings, heading: Heading) -> tuple[float | None, float]:
    """(bytes/s, seconds beside them)."""
    taken = {size: found.publish[size].seconds + series.seconds for size, series in found.pull.items()}
    fixed, per_byte = line(taken)
    if not per_byte:
        return None, fixed
    if found.around.hand_off:
        block = heading.block_size
        shortest = min(found.around.hand_off)
        size = -(-shortest // block) * block * heading.token_bytes
        fixed = max(0.0, found.around.hand_off[shortest].seconds - size * per_byte)
    return 1 / per_byte, fixed


def beside(found: Findings) -> dict[str, dict[str, float]]:
    """How many times as long as alone each phase's steps take beside another's: the median of the turns. In each the
    quick tenth of both is compared: a neighbour is beside every step, also the quickest, and a slow spell of the
    machine is its weather, neighbour or not."""
    shares: dict[str, dict[str, float]] = {}
    for (phase, neighbour), turns in found.beside.items():
        share = median(quantile(sorted(turn.beside), QUICK) / quantile(sorted(turn.alone), QUICK) for turn in turns)
        shares.setdefault(f"{phase}_beside", {})[neighbour] = round(max(1.0, share), 3)
    return shares


def note(found: Findings) -> str:
    """How far the machine let itself be measured."""
    every: list[Series] = [*found.prompts.values(), *found.decodes.values()]
    values, outliers = sum(len(s.values) for s in every), sum(s.outliers for s in every)
    restless = sum(not series.settled for series in every)
    said = f"{len(every)} steps, {values} times; {outliers} times the machine was slow, which do not count"
    return f"{said}; {restless} steps did not settle" if restless else said


def _rounded(value: Any) -> Any:
    """Numbers to ten digits: what a clock tells, and no more than a person wants to read."""
    if isinstance(value, float):
        return float(f"{value:.10g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
