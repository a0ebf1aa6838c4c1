"""A workload: how many tokens each request brings and wants, and when it arrives. Knows no server and no simulator.

    name or file --load()--> Workload --draw(rate, ...)--> Workload with drawn arrivals
                                 |--scaled(), clipped()--> shorter prompts and answers
                                 `--timed?--> replayed as it is: every request, at its own time

Drawn arrivals are a renewal process whose gaps have mean 1/rate: Poisson (coefficient of variation 1), gamma (any
other) or fixed (0). The same seed gives the same lengths at every rate, and gaps that differ only by the factor of
the rates, so that two rates are compared on the same luck; a longer draw begins with the shorter one.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from pathlib import Path

from distserve import traces
from distserve.errors import WorkloadError
from distserve.traces import Arrival

BUILT_IN = ("sharegpt", "humaneval", "longbench")  # data/README.md says where they come from


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival; at least one."""

    name: str  # the built-in name, or the file's
    arrivals: tuple[Arrival, ...]
    timed: bool  # its arrival times mean something: it can be replayed
    rate: float | None = None  # requests a second it was drawn with; None: not drawn
    notes: tuple[str, ...] = ()  # what was changed on the way, a sentence each, for the person to know

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrivals", tuple(self.arrivals))
        if not self.arrivals:
            raise WorkloadError(f"{self.name}: no requests: give at least one")
        before = 0.0
        for number, request in enumerate(self.arrivals, 1):
            if request.arrival < before:
                raise WorkloadError(
                    f"{self.name}: request {number} arrives at {request.arrival:g} s, before the one above it "
                    f"({before:g} s): sort by arrival"
                )
            before = request.arrival

    @classmethod
    def load(cls, name: str | Path) -> Workload:
        """A built-in name or a file (`traces` lists the formats). Raises `WorkloadError` with the cure."""
        path = Path(name)
        if str(name) in BUILT_IN:
            source = resources.files("distserve").joinpath("data", f"{name}.csv")
            trace = traces.parse(source.read_text(encoding="utf-8"), str(name))
        elif path.suffix or path.exists():
            trace = traces.read(path)
        else:
            close = difflib.get_close_matches(str(name), BUILT_IN, 1)
            cure = f"did you mean {close[0]}?" if close else f"give a file, or one of {', '.join(BUILT_IN)}"
            raise WorkloadError(f"there is no workload or file {str(name)!r}: {cure}")
        return cls(path.name, trace.arrivals, trace.timed, notes=trace.notes)

    def __len__(self) -> int:
        return len(self.arrivals)

    def __iter__(self) -> Iterator[Arrival]:
        return iter(self.arrivals)

    @property
    def span(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.arrivals[-1].arrival - self.arrivals[0].arrival

    @property
    def offered_rate(self) -> float | None:
        """Requests a second: what it was drawn with, else what its times say; None where they say nothing."""
        if self.rate is not None or not self.timed:
            return self.rate
        return (len(self) - 1) / self.span if self.span > 0 else None

    @property
    def mean_prompt_tokens(self) -> float:
        return sum(request.prompt_tokens for request in self.arrivals) / len(self)

    @property
    def mean_output_tokens(self) -> float:
        return sum(request.output_tokens for request in self.arrivals) / len(self)

    def head(self, requests: int) -> Workload:
        """The first `requests` of them (all, where there are no more)."""
        _check("requests", requests, requests >= 1, "at least 1")
        return replace(self, arrivals=self.arrivals[:requests])

    def draw(self, rate: float, requests: int, *, seed: int = 0, cv: float = 1.0) -> Workload:
        """`requests` of its lengths in random order at `rate` requests a second; the first arrives at 0.

        Lengths are dealt like cards (every row once before any comes again). `cv`: see the head of this file.
        """
        _check("rate", rate, math.isfinite(rate) and rate > 0, "above 0 requests a second")
        _check("requests", requests, requests >= 1, "at least 1")
        _check("cv", cv, cv == 0 or 0.01 <= cv <= 100, "0 (fixed gaps), or between 0.01 and 100 (1 is Poisson)")
        draws = Draws(self, seed, cv)
        draws.reach(requests)
        found = [
            Arrival(time / rate, r.prompt_tokens, r.output_tokens, r.app)
            for time, r in zip(draws.times, draws.requests, strict=True)
        ]
        return replace(self, arrivals=tuple(found), timed=True, rate=rate)

    def scaled(self, prompt: float, output: float) -> Workload:
        """Lengths times these factors, at least 1 token: a small machine's share of a big one's workload."""
        for name, factor in (("prompt", prompt), ("output", output)):
            _check(f"{name} scale", factor, math.isfinite(factor) and factor > 0, "above 0")
        return self._with_lengths(
            (max(1, round(r.prompt_tokens * prompt)), max(1, round(r.output_tokens * output))) for r in self.arrivals
        )

    def clipped(self, context: int) -> Workload:
        """Lengths cut to what fits a context of `context` tokens: the prompt first, which is the longer part."""
        _check("context", context, context >= 2, "at least 2 tokens (one of prompt, one of answer)")
        longer = sum(r.prompt_tokens + r.output_tokens > context for r in self.arrivals)
        if not longer:
            return self
        lengths = []
        for r in self.arrivals:
            output = min(r.output_tokens, context - 1)
            lengths.append((min(r.prompt_tokens, context - output), output))
        note = f"{longer} of {len(self)} requests were cut to the context of {context} tokens"
        return replace(self._with_lengths(lengths), notes=(*self.notes, note))

    def _with_lengths(self, lengths: Iterable[tuple[int, int]]) -> Workload:
        both = zip(self.arrivals, lengths, strict=True)
        return replace(
            self, arrivals=tuple(replace(r, prompt_tokens=prompt, output_tokens=output) for r, (prompt, output) in both)
        )

    def to_csv(self) -> str:
        """The workload as a file of our format; reading it gives the same requests back, to the last digit."""
        with_app = any(request.app for request in self.arrivals)
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["arrival"] * self.timed + ["prompt_tokens", "output_tokens"] + ["app"] * with_app)
        for r in self.arrivals:
            row: list[object] = [repr(float(r.arrival))] * self.timed + [r.prompt_tokens, r.output_tokens]
            writer.writerow(row + [r.app] * with_app)
        return out.getvalue()


class Draws:
    """What one seed gives of a workload, at any rate: what was dealt once need not be dealt again.

    requests   whose lengths come one after the other
    times      when each arrives, in mean gaps
    """

    def __init__(self, workload: Workload, seed: int, cv: float = 1.0) -> None:
        self.requests: list[Arrival] = []
        self.times: list[float] = []
        self._dealt = _deal(workload.arrivals, random.Random(f"lengths {seed}"))
        self._gaps = _gaps(cv, random.Random(f"gaps {seed}"))
        self._now = 0.0

    def reach(self, requests: int) -> None:
        """Has so many of them, at least."""
        missing = requests - len(self.times)
        for request, gap in zip(islice(self._dealt, max(0, missing)), self._gaps, strict=False):
            self.requests.append(request)
            self.times.append(self._now)
            self._now += gap


def _deal(deck: tuple[Arrival, ...], chance: random.Random) -> Iterator[Arrival]:
    """In random order, every one once before any comes again; without end. (What `Random.sample` of all of them gives,
    one by one: who asks for a hundred need not shuffle ten thousand.)"""
    while True:
        left = list(deck)
        for number in range(len(left), 0, -1):
            at = chance.randrange(number)
            yield left[at]
            left[at] = left[number - 1]


def _gaps(cv: float, chance: random.Random) -> Iterator[float]:
    """Gaps between arrivals, in units of their mean, without end."""
    while True:
        if cv == 0:
            yield 1.0
        elif cv == 1:
            yield chance.expovariate(1.0)
        else:
            yield chance.gammavariate(1 / cv**2, cv**2)


def _check(name: str, value: float, good: bool, limit: str) -> None:
    if not good:
        raise WorkloadError(f"{name} {value:g} must be {limit}")
