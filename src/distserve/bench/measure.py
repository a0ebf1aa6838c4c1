"""One run of a load, and what came of it: the report, and what makes its figures say something else than they seem to.

A run may be asked for a verdict (`Until`): then it ends as soon as too many requests have missed their targets for the
goal to be met, or when all that count are over; until then the load goes on behind them. Knows no second run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from distserve import metrics, steady
from distserve.bench.client import CLIENT_LIMIT, UNFINISHED, UNREACHABLE, Result, clock
from distserve.bench.load import Load, Prepare, Run, Send, lateness, sent_share
from distserve.bench.stream import Answer
from distserve.metrics import SLO, Record, Report
from distserve.tables import rounded
from distserve.workload import Workload

# The client itself spoils the figures from so late on at p99: seconds, and share of the median TTFT.
_LATE, _LATE_SHARE = 0.010, 0.05
_BUSY = 0.9  # share of a core from which on the client can do no more
_KEPT_UP = 0.97  # of the rate: below it the client did not offer what it was asked for


@dataclass(frozen=True, slots=True)
class Until:
    """A run for a verdict: `requests` (warm-up included) are judged, those behind them only keep up the load."""

    requests: int
    goal: float


@dataclass(frozen=True, slots=True)
class Offer:
    """What one run offers."""

    workload: Workload  # with arrival times
    warmup: float  # seconds from the first arrival whose requests count for nothing
    seed: int | None = None  # of the arrivals; None: replayed
    salt: int = 0  # of the prompts
    until: Until | None = None
    length: float = 1.0  # in usual ones


@dataclass(slots=True)
class Outcome:
    """One run, told."""

    offer: Offer
    run: Run
    records: list[Record]  # what the report is of, in order of arrival; warm-up included
    report: Report
    unsteady: str  # why this is no steady state; "": nothing speaks against it
    growing: bool  # queues grew
    bottleneck: str  # how the client spoiled the figures; "": it did not
    warnings: list[str]

    @property
    def counted(self) -> list[Record]:
        start = self.records[0].arrival + self.report.warmup
        return [record for record in self.records if record.arrival >= start]

    @property
    def kept_up(self) -> bool:
        return sent_share(self.run) >= _KEPT_UP

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the report, and what is known beyond it."""
        run = self.run
        late, lag = lateness(run)
        return {
            **self.report.to_dict(),
            "unsteady": self.unsteady or None,
            "interrupted": run.interrupted,
            "client": {
                "cpu": run.cpu / run.seconds if run.seconds else 0.0,
                "late_p99": late,
                "lag_p99": lag,
                "sent_share": sent_share(run),
                "bottleneck": bool(self.bottleneck),
            },
            "warnings": self.warnings,
        }


@dataclass(slots=True)
class Measure:
    """A run that is about to begin, or going on. `send` fills `answers`."""

    offer: Offer
    slo: SLO
    load: Load
    answers: dict[int, Answer]  # of requests in flight, by number

    @property
    def waiting(self) -> int:
        """Requests in flight without a token yet."""
        return sum(answer.first is None for answer in self.answers.values())


@dataclass(slots=True)
class Watch:
    """Hears results until the verdict is certain."""

    offer: Offer
    slo: SLO
    _warm: int = field(init=False)  # requests that load the server but do not count
    _left: int = field(init=False)  # that count and are not over
    _may_miss: int = field(init=False)
    _missed: int = 0

    def __post_init__(self) -> None:
        until, arrivals = self.offer.until, self.offer.workload.arrivals
        assert until is not None
        start = arrivals[0].arrival + self.offer.warmup
        self._warm = sum(request.arrival < start for request in arrivals[: until.requests])
        self._left = until.requests - self._warm
        self._may_miss = math.floor((1 - until.goal) * self._left + 1e-9)  # 1 - 0.9 is a little less than 0.1

    def __call__(self, number: int, result: Result) -> bool:
        assert self.offer.until is not None
        if not self._warm <= number < self.offer.until.requests:
            return False
        self._left -= 1
        self._missed += not self.slo.met(result.record)
        return not self._left or self._missed > self._may_miss


def prepared(offer: Offer, slo: SLO, send: Send, prepare: Prepare, answers: dict[int, Answer]) -> Measure:
    """A run that `load.go` starts."""
    arrivals = offer.workload.arrivals
    load = Load(arrivals, send, prepare, Watch(offer, slo)) if offer.until else Load(arrivals, send, prepare)
    return Measure(offer, slo, load, answers)


def told(measure: Measure, devices: int | None, notes: Sequence[str], exact_length: bool) -> Outcome | None:
    """What came of a run that is over; None: no request was."""
    offer, slo, run = measure.offer, measure.slo, measure.load.run
    late = _unfinished(measure)
    last = offer.workload.arrivals[offer.until.requests - 1 if offer.until else -1].arrival
    records = sorted((*run.records, *late), key=lambda record: record.arrival)
    records = [record for record in records if record.arrival <= last]
    if not records:
        return None
    end = max((result.end for result in run.results if result.asked.arrival <= last), default=clock())
    warnings = [*notes, *_failures(run), *_answers(run, exact_length)]
    if run.interrupted:
        missed = f"; {len(late)} of them had missed the TTFT target already and count as missed" if late else ""
        warnings.append(f"stopped early: {len(run.dropped)} requests in flight were dropped and do not count{missed}")
    warmup = offer.warmup
    if records[-1].arrival - run.origin < warmup:
        warmup = 0.0
        warnings.append("stopped within the warm-up: every request counts")
    report = metrics.report(
        records,
        slo,
        end=end - run.start + run.origin,
        rate=offer.workload.rate,
        devices=devices,
        warmup=warmup,
        seed=offer.seed,
    )
    counted = [record for record in records if record.arrival - records[0].arrival >= warmup]
    away = sum(record.status == UNREACHABLE for record in counted)
    growing = "" if away else steady.growing(counted, slo)  # what was away has no queues to judge
    # a run that was stopped is short for another reason
    whole = not run.dropped and (offer.until is None or len(records) == offer.until.requests)
    gone = f"the server was not there for {away} of the requests that count" if away else ""
    unsteady = gone or growing or (steady.short(counted) if whole and offer.workload.rate is not None else "")
    if growing and offer.until is None:  # a search runs longer by itself
        warnings.append(
            f"queues still grow: {growing}; there may be no steady state at this rate, a longer run (-n) tells"
        )
    elif unsteady and not growing and not gone:  # that is a failure, and told as one
        warnings.append(f"too short to settle: {unsteady}; offer more (-n)")
    bottleneck = "; ".join(_bottleneck(run, offer.workload.rate))
    if bottleneck:
        warnings.append(f"this client was the bottleneck: {bottleneck}; give it a core that the server does not use")
    return Outcome(offer, run, records, report, unsteady, bool(growing), bottleneck, warnings)


def _unfinished(measure: Measure) -> list[Record]:
    """Requests that were in flight at the end and can no longer meet the TTFT target. Leaving them out would flatter:
    they are the slow ones."""
    target = measure.slo.ttft
    if target is None:
        return []
    found, now = [], clock()
    for number, request, due in measure.load.run.dropped:
        answer = measure.answers.get(number)
        first = answer.first if answer is not None else None
        if (first if first is not None else now) - due > target:
            record = Record(
                request.arrival, request.prompt_tokens, request.output_tokens, status=UNFINISHED, app=request.app
            )
            found.append(record)
    return found


def _failures(run: Run) -> Iterator[str]:
    messages: dict[str, str] = {}
    for result in run.results:
        if not result.record.ok:
            messages.setdefault(result.record.status, result.message)
    for status, message in messages.items():
        number = sum(result.record.status == status for result in run.results)
        cure = ": let it open more files (ulimit -n)" if status == CLIENT_LIMIT else ""
        yield f"{number} requests {status}, the first: {message}{cure}"


def _answers(run: Run, exact_length: bool) -> Iterator[str]:
    """Lengths that are not the workload's."""
    good = [result for result in run.results if result.record.ok]
    short = sum(result.record.output_tokens < result.asked.output_tokens for result in good)
    if short and exact_length:
        yield f"{short} answers were shorter than asked for: does the server know ignore_eos? is its context shorter?"
    uncounted = sum(result.counted_events for result in good)
    if uncounted:
        yield f"{uncounted} answers came without usage: their tokens are counted by events of the stream"
    off = [
        abs(result.record.prompt_tokens - result.asked.prompt_tokens) / result.asked.prompt_tokens for result in good
    ]
    if off and sum(off) / len(off) > 0.01:
        yield f"prompts are {sum(off) / len(off):.0%} off the workload's lengths: the server's own count is reported"


def _bottleneck(run: Run, rate: float | None) -> Iterator[str]:
    """How the client spoiled the figures."""
    late, lag = lateness(run)
    waits = sorted(result.record.ttft for result in run.results if result.record.ok and result.record.ttft is not None)
    share = sent_share(run)
    if share < _KEPT_UP:
        asked = f"{rate:g} requests/s" if rate is not None else "requests"
        sent = f"{rounded(rate * share)}/s" if rate is not None else f"them at {share:.0%} of their rate"
        yield f"asked to offer {asked}, it sent {sent}"
    if max(late, lag) > max(_LATE, _LATE_SHARE * metrics.quantile(waits, 0.5) if waits else 0.0):
        yield (
            f"at p99 requests left {late * 1000:.0f} ms late and its loop lagged {lag * 1000:.0f} ms, which latencies "
            "include"
        )
    if run.seconds and run.cpu / run.seconds > _BUSY:
        yield f"it used {run.cpu / run.seconds:.0%} of a core"
