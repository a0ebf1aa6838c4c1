"""The measures, defined once, for live and simulated requests alike. Knows neither world: it is given records.

    TTFT         first token received minus (scheduled) arrival
    TPOT         (last token - first token) / (output tokens - 1); one output token: none, and the target is met
    attainment   share of all offered requests that meet TTFT and TPOT (joint), or one of them; refused and failed
                 requests are offered ones that meet nothing
    warm-up      seconds from the first arrival on whose requests count for nothing but their load
    quantiles    of completed requests, linear between neighbours

A queue remembers: whether a request meets its target says much about the next one. So the confidence interval of an
attainment does not take n requests for n independent ones; it compares the spread of the means of consecutive batches
with that of independent requests (batch means, Law & Kelton, Simulation Modeling and Analysis, section 9.5.3) and
gives Wilson's interval for as many requests as are left.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any, TextIO

from distserve.errors import UsageError

OK = "ok"  # the status of a request that got its whole answer; any other names what went wrong
REFUSED = "refused"  # 429: the server protects those it has admitted
UNAVAILABLE = "unavailable"  # 503
SERVER_ERROR = "server_error"  # any other failure of the server, or an error inside the stream
CANCELLED = "cancelled"  # the client went away
QUANTILES = (0.5, 0.9, 0.99)
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Record:
    """What became of one offered request."""

    arrival: float  # seconds; when it was due, not when a late client sent it
    prompt_tokens: int
    output_tokens: int  # received where it is over, else asked for
    ttft: float | None = None  # seconds; None: no token came
    tpot: float | None = None  # seconds; None: fewer than two tokens came
    status: str = OK
    app: str = ""

    @property
    def ok(self) -> bool:
        return self.status == OK


@dataclass(frozen=True, slots=True)
class SLO:
    """The targets, in seconds; None: any time will do."""

    ttft: float | None = None
    tpot: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft", "tpot"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"the {name} target {value} must be above 0 seconds")

    @classmethod
    def parse(cls, text: str) -> SLO:
        """`ttft=0.25,tpot=0.1`: seconds, or with a unit (`250ms`, `0.25s`); either may be left out."""
        found: dict[str, float] = {}
        for part in text.split(","):
            match = re.fullmatch(
                r"\s*(ttft|tpot)\s*=\s*(\d+\.?\d*(?:e-?\d+)?|\.\d+)\s*(ms|s|us)?\s*", part, re.IGNORECASE
            )
            if match is None or match[1].lower() in found:
                raise UsageError(f"SLO {text!r}: write each target once, such as ttft=0.25,tpot=0.1 (s) or ttft=250ms")
            scale = {"s": 1.0, "ms": 1e-3, "us": 1e-6}[(match[3] or "s").lower()]
            found[match[1].lower()] = float(match[2]) * scale
        return cls(**found)

    def __str__(self) -> str:
        targets = [f"{name} {value:g} s" for name in ("ttft", "tpot") if (value := getattr(self, name)) is not None]
        return ", ".join(targets) or "none"

    def ttft_met(self, record: Record) -> bool:
        return record.ok and self.ttft_is(record.ttft)

    def tpot_met(self, record: Record) -> bool:
        return record.ok and self.tpot_is(record.tpot)

    def ttft_is(self, ttft: float | None) -> bool:
        """Whether this TTFT of a completed request meets its target."""
        return self.ttft is None or (ttft is not None and ttft <= self.ttft)

    def tpot_is(self, tpot: float | None) -> bool:
        """The same of a TPOT."""
        return self.tpot is None or tpot is None or tpot <= self.tpot

    def met(self, record: Record) -> bool:
        return self.ttft_met(record) and self.tpot_met(record)


@dataclass(frozen=True, slots=True)
class Targets:
    """SLOs of several applications, by the name that a request carries."""

    default: SLO = SLO()  # of requests whose application is not among them
    by_app: tuple[tuple[str, SLO], ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Targets:
        """Each `[APP:]ttft=0.25,tpot=0.1`; the one without an application is of all that are not named."""
        default, by_app = None, {}
        for text in texts:
            app, colon, targets = text.rpartition(":")
            app, slo = app.strip(), SLO.parse(targets)
            if (not colon and default is not None) or app in by_app or (colon and not app):
                raise UsageError(f"SLO {text!r}: give each application's once, such as chat:ttft=0.25,tpot=0.1")
            if colon:
                by_app[app] = slo
            else:
                default = slo
        return cls(default or SLO(), tuple(by_app.items()))

    def __str__(self) -> str:
        named = [f"{app}: {slo}" for app, slo in self.by_app]
        return "; ".join(named + ([str(self.default)] if self.default != SLO() or not named else []))

    def of(self, app: str) -> SLO:
        for name, slo in self.by_app:
            if name == app:
                return slo
        return self.default

    def ttft_met(self, record: Record) -> bool:
        return self.of(record.app).ttft_met(record)

    def tpot_met(self, record: Record) -> bool:
        return self.of(record.app).tpot_met(record)

    def met(self, record: Record) -> bool:
        return self.of(record.app).met(record)


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and quantiles in seconds; None where nothing was measured."""

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None

    @classmethod
    def of(cls, values: Iterable[float]) -> Summary:
        ordered = sorted(values)
        if not ordered:
            return cls()
        return cls(math.fsum(ordered) / len(ordered), *(quantile(ordered, q) for q in QUANTILES))


@dataclass(frozen=True, slots=True)
class Attainment:
    """Shares between 0 and 1 of the counted requests."""

    joint: float
    ttft: float
    tpot: float


@dataclass(frozen=True, slots=True)
class Interval:
    """Where each true attainment lies with probability `level`: (low, high)."""

    level: float
    joint: tuple[float, float]
    ttft: tuple[float, float]
    tpot: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Report:
    """The answer of a run, live or simulated. Latencies and attainment are of the counted requests (after warm-up)."""

    requests: int  # offered in the whole run
    counted: int  # of those, after the warm-up
    completed: int  # of the counted
    failed: dict[str, int]  # of the counted, by status
    duration: float  # seconds from the first arrival until the last request was over
    rate: float | None  # requests offered a second; None: too few to tell
    attainment: Attainment
    interval: Interval
    ttft: Summary
    tpot: Summary
    throughput: dict[str, float]  # completed a second over the whole run: requests, prompt_tokens, output_tokens
    slo: SLO
    devices: int | None  # None: not known (a foreign server)
    rate_per_device: float | None
    warmup: float  # seconds
    seed: int | None  # of drawn arrivals; None: replayed
    by_app: dict[str, Attainment] = field(default_factory=dict)  # where the workload names applications

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain values, no NaN or infinity."""
        return asdict(self)


def report(
    records: Sequence[Record],
    slo: SLO,
    *,
    end: float,
    rate: float | None = None,
    devices: int | None = None,
    warmup: float = 0.0,
    seed: int | None = None,
    targets: Targets | None = None,
) -> Report:
    """Everything about a run. `end`: when the last request was over, on the clock of the arrivals. `rate`: what was
    asked for; None: what the arrivals say. `targets` judge in place of `slo` where applications have their own. Raises
    `UsageError` where the warm-up leaves nothing to count."""
    judge = targets or slo
    if not records:
        raise UsageError("no requests to report: offer at least one")
    records = sorted(records, key=lambda record: record.arrival)
    start, last = records[0].arrival, records[-1].arrival
    counted = [record for record in records if record.arrival - start >= warmup]
    if not counted:
        raise UsageError(
            f"a warm-up of {warmup:g} s leaves none of {len(records)} requests: offer more or warm up less"
        )
    if rate is None and last > start:
        rate = (len(records) - 1) / (last - start)
    completed = [record for record in records if record.ok]
    good = [record for record in counted if record.ok]
    duration = end - start
    per_second = 1 / duration if duration > 0 else 0.0
    apps = sorted({record.app for record in counted} - {""})
    return Report(
        requests=len(records),
        counted=len(counted),
        completed=len(good),
        failed=dict(sorted(Counter(record.status for record in counted if not record.ok).items())),
        duration=duration,
        rate=rate,
        attainment=attainment(counted, judge),
        interval=_interval(counted, judge),
        ttft=Summary.of(record.ttft for record in good if record.ttft is not None),
        tpot=Summary.of(record.tpot for record in good if record.tpot is not None),
        throughput={
            "requests": len(completed) * per_second,
            "prompt_tokens": sum(record.prompt_tokens for record in completed) * per_second,
            "output_tokens": sum(record.output_tokens for record in completed) * per_second,
        },
        slo=slo,
        devices=devices,
        rate_per_device=rate / devices if rate is not None and devices else None,
        warmup=warmup,
        seed=seed,
        by_app={app: attainment([record for record in counted if record.app == app], judge) for app in apps},
    )


def tpot(first: float, last: float, output_tokens: int) -> float | None:
    """TPOT of an answer whose first and last token came at these times."""
    return (last - first) / (output_tokens - 1) if output_tokens > 1 else None


def attainment(records: Sequence[Record], slo: SLO | Targets) -> Attainment:
    """Of at least one record."""
    n = len(records)
    return Attainment(*(sum(map(met, records)) / n for met in (slo.met, slo.ttft_met, slo.tpot_met)))


def quantile(ordered: Sequence[float], q: float) -> float:
    """The value below which a share `q` of the ascending values lies, linear between neighbours (numpy's default)."""
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def default_warmup(span: float) -> float:
    """Seconds dropped from a run with drawn arrivals unless told otherwise: a tenth, for its queues to settle."""
    return span / 10


def _interval(records: Sequence[Record], slo: SLO | Targets) -> Interval:
    """`records` in order of arrival."""

    def of(met: Callable[[Record], bool]) -> tuple[float, float]:
        return proportion_interval([met(record) for record in records])

    return Interval(CONFIDENCE, of(slo.met), of(slo.ttft_met), of(slo.tpot_met))


def proportion_interval(outcomes: Sequence[bool], level: float = CONFIDENCE) -> tuple[float, float]:
    """Where the true share of True lies; `outcomes` in order of arrival, neighbours may depend on each other."""
    n = len(outcomes)
    p = sum(outcomes) / n
    independent = n / _dependence(outcomes, p)
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (p + z * z / (2 * independent)) / (1 + z * z / independent)
    half = z / (1 + z * z / independent) * math.sqrt(p * (1 - p) / independent + (z / (2 * independent)) ** 2)
    # at p = 0 or 1 a bound is p itself, which floating point misses by 1e-17
    return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))


def _dependence(outcomes: Sequence[bool], p: float) -> float:
    """How many requests weigh as much as one independent request, at least 1.

    The variance of the means of about sqrt(n) batches of about sqrt(n) consecutive requests, over the variance that
    independent requests would give.
    """
    size = math.isqrt(len(outcomes))
    if size < 3 or p in (0.0, 1.0):
        return 1.0  # too few to see a dependence
    batches = [outcomes[i : i + size] for i in range(0, len(outcomes) - size + 1, size)]
    means = [sum(batch) / size for batch in batches]
    centre = sum(means) / len(means)
    variance = sum((mean - centre) ** 2 for mean in means) / (len(means) - 1)
    return min(max(1.0, variance * size / (p * (1 - p))), float(size))


def write_requests(records: Iterable[Record], out: TextIO) -> None:
    """One row a request: `arrival,prompt_tokens,output_tokens,ttft,tpot,status[,app]`, seconds; an empty cell: none."""
    records = list(records)
    with_app = any(record.app for record in records)
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["arrival", "prompt_tokens", "output_tokens", "ttft", "tpot", "status"] + ["app"] * with_app)
    for r in records:
        times = ["" if value is None else f"{value:.6f}" for value in (r.ttft, r.tpot)]
        writer.writerow(
            [repr(float(r.arrival)), r.prompt_tokens, r.output_tokens, *times, r.status] + [r.app] * with_app
        )
