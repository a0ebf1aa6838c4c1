"""docs/accuracy.md: the tables. The words between them are in `words.py`; every figure in them is computed here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.accuracy import variants, words
from experiments.accuracy.runs import real_runs
from experiments.accuracy.score import (
    MEAN_ERROR,
    MEDIAN_ERROR,
    SLOS,
    WORST_ERROR,
    Measured,
    Score,
    mean_and_worst,
    score,
)
from experiments.accuracy.spans import Pace, Spans, alone, regress
from experiments.accuracy.tables import table

EQUAL = ("vllm-100-1", "vllm-300-3")  # the runs that agree with each other
WINDOW = 20  # seconds
MAX_PADDING = 256  # tokens; vLLM 0.2.3, vllm/engine/arg_utils.py
PLATEAU = ("vllm-300-3", range(70, 116, 5))


def text(scores: Sequence[Score]) -> str:
    """The document."""
    parts = [
        words.OPENING,
        verdict(scores),
        "## Every run",
        words.RUNS,
        attainments(scores),
        words.LATENCIES,
        latencies(scores, "ttft"),
        latencies(scores, "tpot"),
        words.PLOTS,
        "## What makes the difference",
        words.MECHANISMS,
        mechanisms("a100-80g"),
        words.ROOM,
        words.PULLS,
        words.HOST,
        words.PIPELINE,
        jitter(),
        words.AFTER_JITTER,
        "## vLLM's runs",
        words.VLLM,
        mechanisms("a100-80g-vllm"),
        words.PLATEAU,
        plateau(),
        words.TWO_ENGINES,
        prompt_steps(),
        words.PACE,
        pace(),
        words.AFTER_PACE,
        two_vllms(),
        words.AFTER_TWO,
        "## Which runs the parameters were fitted on",
        words.FITTED,
        fits(),
        words.AFTER_FITS,
        words.NOT_SIMULATED,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def points(share: float) -> str:
    """A difference of shares, in points."""
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def percent(ratio: float, digits: int = 1) -> str:
    return f"{round(100 * ratio, digits) + 0.0:+.{digits}f} %"


def verdict(scores: Sequence[Score]) -> str:
    """Targets beside what is reached."""
    ours = mean_and_worst(error for found in scores for error in found.errors())
    theirs = mean_and_worst(error for found in scores for error in found.errors(found.upstream))

    def medians(of_vllm: bool, upstream: bool) -> float:
        chosen = [found for found in scores if found.run.of_vllm == of_vllm]
        return mean_and_worst(e for s in chosen for e in s.median_errors(s.upstream if upstream else None))[1]

    rows = []
    for what, target, mine, others in (
        ("mean error of attainment, points", MEAN_ERROR, ours[0], theirs[0]),
        ("worst error of attainment, points", WORST_ERROR, ours[1], theirs[1]),
        ("worst median, DistServe's seven runs, %", MEDIAN_ERROR, medians(False, False), medians(False, True)),
        ("worst median, vLLM's three runs, %", MEDIAN_ERROR, medians(True, False), medians(True, True)),
    ):
        met = "met" if mine <= target + 1e-9 else "**not met**"
        rows.append([what, f"{100 * target:.0f}", f"{100 * mine:.1f}", met, f"{100 * others:.1f}"])
    return table(["", "target: at most", "ours", "", "upstream's simulator"], rows)


def attainments(scores: Sequence[Score]) -> str:
    rows = []
    for found in scores:
        cells = [found.run.name]
        for i in range(len(SLOS)):
            real, ours, theirs = (m.attainment[i] for m in (found.real, found.ours, found.upstream))
            cells += [f"{100 * real:.1f}", f"{100 * ours:.1f} ({points(ours - real)})"]
            cells += [f"{100 * theirs:.1f} ({points(theirs - real)})"]
        rows.append(cells)
    for name, pick in (("**mean error**", 0), ("**worst error**", 1)):
        cells = [name]
        for i in range(len(SLOS)):
            for theirs in (False, True):
                errors = [found.errors(found.upstream if theirs else None)[i] for found in scores]
                cells += [""] * (not theirs) + [f"**{100 * mean_and_worst(errors)[pick]:.1f}**"]
        rows.append(cells)
    head = ["run"]
    for slo in SLOS:
        head += [f"({slo.ttft:g} s, {slo.tpot:g} s) real", "ours", "upstream"]
    return table(head, rows)


def latencies(scores: Sequence[Score], name: str) -> str:
    """TTFT or TPOT."""
    head = [f"{name.upper()}, ms"]
    for quantile in ("p50", "p90"):
        head += [f"{quantile} real", "ours", "upstream"]
    rows = [[found.run.name, *_latency_cells(found, name)] for found in scores]
    for who, of_vllm in (("DistServe's", False), ("vLLM's", True)):
        chosen = [found for found in scores if found.run.of_vllm == of_vllm]
        cells = [f"**mean and worst error, {who}**"]
        for i in range(2):
            for theirs in (False, True):
                errors = [_values(s, name, theirs)[i] / _values(s, name, None)[i] - 1 for s in chosen]
                mean, worst = mean_and_worst(errors)
                cells += [""] * (not theirs) + [f"**{100 * mean:.1f} %, {100 * worst:.1f} %**"]
        rows.append(cells)
    return table(head, rows)


def _values(found: Score, name: str, upstream: bool | None) -> tuple[float, float]:
    """(p50, p90), of the real run (None), of upstream's simulator or of ours."""
    measured: Measured = found.real if upstream is None else found.upstream if upstream else found.ours
    return measured.ttft if name == "ttft" else measured.tpot


def _latency_cells(found: Score, name: str) -> list[str]:
    cells = []
    for i in range(2):
        real = _values(found, name, None)[i]
        cells.append(f"{1e3 * real:.1f}")
        for upstream in (False, True):
            value = _values(found, name, upstream)[i]
            cells.append(f"{1e3 * value:.1f} ({percent(value / real - 1)})")
    return cells


def mechanisms(costs_name: str) -> str:
    rows = [
        [
            without.what,
            f"{100 * without.attainment[0]:.1f}",
            f"{100 * without.attainment[1]:.1f}",
            percent(without.worst_medians[0], 0),
            percent(without.worst_medians[1], 0),
        ]
        for without in variants.mechanisms(costs_name)
    ]
    return table(
        ["left out", "mean error of attainment", "worst", "worst median TTFT", "worst median TPOT"],
        rows,
    )


def jitter() -> str:
    """How far arrivals that move by milliseconds move the answer."""
    rows = []
    for run in real_runs().values():
        found = variants.jittered(run)
        medians = [s.median_errors() for s in found]
        rows.append(
            [
                run.name,
                ", ".join(percent(tpot) for _, tpot in medians),
                f"{percent(min(t for t, _ in medians))} to {percent(max(t for t, _ in medians))}",
                f"{points(min(s.errors()[1] for s in found))} to {points(max(s.errors()[1] for s in found))}",
            ]
        )
    return table(
        ["run", "error of median TPOT, seed by seed", "of median TTFT", f"of attainment ({SLOS[1].ttft:g} s), points"],
        rows,
    )


def plateau() -> str:
    name, times = PLATEAU
    spans = Spans.real(real_runs()[name])
    rows = []
    for time in times:
        waiting, oldest = spans.waiting(time)
        rows.append(
            [
                f"{time}",
                f"{spans.active(time)}",
                f"{spans.context(time):,}",
                f"{waiting}",
                f"{oldest:.1f}" if waiting else "",
            ]
        )
    return table(["time, s", "decoding", "their KV, tokens", "waiting", "the oldest for, s"], rows)


def prompt_steps() -> str:
    """What the logs of vLLM's runs show of its prompt steps."""
    rows = []
    for run in real_runs().values():
        if run.of_vllm:
            steps = Spans.real(run).prompt_steps()
            shared = [step.padding for step in steps if len(step.lengths) > 1]
            base, per_token = alone(steps)
            longest = max(shared, default=0)
            rows.append(
                [
                    run.name,
                    f"{len(shared)}",
                    f"{longest:,}",
                    f"{sum(padding > MAX_PADDING for padding in shared)}",
                    f"{1e3 * base:.1f}",
                    f"{1e6 * per_token:.0f}",
                ]
            )
    return table(
        [
            "run",
            "prompt steps of several",
            "largest padding, tokens",
            f"over {MAX_PADDING}",
            "a prompt alone, ms",
            "and µs a token",
        ],
        rows,
    )


def pace() -> str:
    """Real decode time over what the two runs that agree make of the same batches."""
    paces = {run.name: Pace.of(Spans.real(run)) for run in real_runs().values() if run.of_vllm}
    found = regress([paces[name] for name in EQUAL])
    starts = range(0, 120, WINDOW)
    rows = []
    for name, seen in paces.items():
        ratios = seen.seconds / (seen.work @ found)
        cells = [name, f"{np.median(ratios):.2f}"]
        for start in starts:
            chosen = (seen.middle >= start) & (seen.middle < start + WINDOW)
            cells.append(f"{np.median(ratios[chosen]):.2f} ({seen.batch[chosen].mean():.0f})" if chosen.any() else "")
        rows.append(cells)
    step, sequence, context, prompt, token = found
    formula = (
        f"{1e3 * step:.1f} ms a step + {1e3 * sequence:.2f} ms a sequence + {1e6 * context:.2f} µs a token of context, "
        f"and {1e3 * prompt:.1f} ms + {1e6 * token:.0f} µs a token for each prompt between"
    )
    head = ["run", "whole run", *(f"{start}-{start + WINDOW} s" for start in starts)]
    return f"Fitted on {' and '.join(EQUAL)}: {formula}.\n\n{table(head, rows)}"


def two_vllms() -> str:
    """Each run with the habits of the vLLM that served it, and with the other's."""
    rows = []
    for run in real_runs().values():
        if run.of_vllm:
            for habits in sorted(variants.VLLMS, key=lambda habits: run.name not in habits.runs):
                found = score(run, habits.costs())
                own = "its own" if run.name in habits.runs else "the other's"
                slowest = found.ours.ttft[1] / found.real.ttft[1] - 1, found.ours.tpot[1] / found.real.tpot[1] - 1
                rows.append(
                    [run.name, own, *map(points, found.errors()), *map(percent, (*found.median_errors(), *slowest))]
                )
    head = ["run", "host", *(f"attainment ({slo.ttft:g} s)" for slo in SLOS)]
    return table([*head, "median TTFT", "median TPOT", "p90 TTFT", "p90 TPOT"], rows)


def fits() -> str:
    rows = []
    for fit in variants.decode_host_fits():
        on = ", ".join(name.removeprefix("distserve-") for name in fit.on)
        cells = [on, f"{1e3 * fit.per_step:.1f} + {1e3 * fit.per_sequence:.3f}"]
        for name, found in zip((*variants.FITTED, *variants.UNTOUCHED), fit.scores, strict=True):
            error = percent(found.median_errors()[1])
            worst = 100 * mean_and_worst(found.errors())[1]
            cells.append(f"{error}, {worst:.1f}" if name in fit.on else f"**{error}, {worst:.1f}**")
        rows.append(cells)
    names = [name.removeprefix("distserve-") for name in (*variants.FITTED, *variants.UNTOUCHED)]
    return table(["fitted on", "ms a step + ms a sequence", *names], rows)
