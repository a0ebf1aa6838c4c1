"""How long a batch takes on one instance, in closed form. Knows coefficients, not where they come from (a measurement,
a published fit, a roofline), and no device.

A step computes new tokens for sequences that are prompts (or pieces of them) and for sequences that decode:

    prefill    max over lines of   base + per_token * sum(n) + per_square * sum((p + n)^2 - p^2)
    decode     by batch size       base + per_context * sum(context) + per_sequence * batch

n new tokens after p computed ones; context counts the new token. For whole prompts these are the sums of lengths and of
their squares (DistServe, OSDI'24, appendix A). A mixed step reads the weights once: its products cost what the more
expensive of the two formulas says, with prompt and decode rows together in the first, and both attentions are added.

Where points were measured, what they differ from the formula is interpolated linearly between them and added, so that a
measured step takes exactly what was measured. Seconds and tokens throughout.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distserve.knee import SIZES, knee
from distserve.sched.base import Sequence as Scheduled


class PrefillLine(NamedTuple):
    """Seconds of a step of prompts."""

    base: float
    per_token: float
    per_square: float  # per token^2

    def __call__(self, tokens: float, squares: float) -> float:
        return self.base + self.per_token * tokens + self.per_square * squares


class DecodeLine(NamedTuple):
    """Seconds of a step that decodes `from_batch` sequences or more (until the next line's)."""

    from_batch: int
    base: float
    per_context: float  # per token of context, summed over the batch
    per_sequence: float


class Run(NamedTuple):
    """A decode batch whose members stay: a step takes `seconds`, and each further one `growth` more than the one before
    it, for `steps` steps at least."""

    seconds: float
    growth: float
    steps: float


Points = tuple[tuple[float, float], ...]  # (x, y) by x
EVER = float("inf")


@dataclass(frozen=True, slots=True)
class Coefficients:
    """All layers in one pass, at one tensor parallelism."""

    prefill: tuple[PrefillLine, ...]  # the one that gives most counts
    decode: tuple[DecodeLine, ...]  # by from_batch
    prefill_rest: Points = ()  # (tokens of a single prompt, measured less formula)
    decode_rest: tuple[tuple[int, Points], ...] = ()  # by batch size: (summed context, measured less formula)

    def prompts(self, tokens: float, squares: float) -> float:
        """Seconds to compute `tokens` prompt tokens, sum of squares `squares`."""
        seconds = max(line(tokens, squares) for line in self.prefill)
        return seconds + interpolate(self.prefill_rest, tokens) if self.prefill_rest else seconds

    def decode_line(self, batch: int) -> DecodeLine:
        lines = self.decode
        return lines[max(0, bisect_right(lines, batch, key=_from_batch) - 1)]

    def decodes(self, batch: int, context: float) -> float:
        """Seconds of a step that decodes `batch` sequences of `context` tokens together."""
        line = self.decode_line(batch)
        seconds = line.base + line.per_context * context + line.per_sequence * batch
        return seconds + self._rest(batch, context)[0] if self.decode_rest else seconds

    def mixed(self, tokens: float, squares: float, batch: int, context: float) -> float:
        """Seconds of a step with both."""
        line = self.decode_line(batch)
        products = max(p.base + p.per_token * (tokens + batch) for p in self.prefill)
        attention = min(p.per_square for p in self.prefill) * squares + line.per_context * context
        return max(products, line.base + line.per_sequence * batch) + max(0.0, attention)

    def run(self, batch: int, context: float) -> Run:
        line = self.decode_line(batch)
        seconds = line.base + line.per_context * context + line.per_sequence * batch
        if not self.decode_rest:
            return Run(seconds, line.per_context * batch, EVER)
        rest, slope, until = self._rest(batch, context)
        return Run(seconds + rest, (line.per_context + slope) * batch, max(1.0, (until - context) // batch + 1))

    def _rest(self, batch: int, context: float) -> tuple[float, float, float]:
        """(value, slope by context, context until which the slope holds) of what was measured beside the formula."""
        rows = self.decode_rest
        at = bisect_right(rows, batch, key=_from_batch)
        low, high = rows[max(0, at - 1)], rows[min(at, len(rows) - 1)]
        share = (batch - low[0]) / (high[0] - low[0]) if high[0] > low[0] and batch > low[0] else 0.0
        parts = [(1 - share, low[1])] + ([(share, high[1])] if share else [])
        value = sum(weight * interpolate(points, context) for weight, points in parts)
        slope = sum(weight * _slope(points, context) for weight, points in parts)
        until = min((x for _, points in parts for x, _ in points if x > context), default=EVER)
        return value, slope, until


@dataclass(frozen=True, slots=True)
class Host:
    """What a step costs the processor that drives the device, before the device starts."""

    per_step: float = 0.0
    per_token: float = 0.0  # of a prompt in it
    per_sequence: float = 0.0


@dataclass(frozen=True, slots=True)
class Latency:
    """Steps of one instance of `pp` stages. A stage is busy `stage(...)` with a batch and then hands it to the next;
    the host prepares a batch (`host(...)`) before its first stage starts, and cannot do so for two at once."""

    coefficients: Coefficients
    pp: int = 1
    share: float = 1.0  # of all layers in the stage that has most of them
    handover: float = 0.0  # from one stage to the next
    prompt_step: Host = Host()  # of steps with prompts
    decode_step: Host = Host()
    padded: bool = False  # the prompts of a step are computed as long as the longest of them

    def batch(self, items: Iterable[tuple[Scheduled, int]]) -> tuple[float, float]:
        """(host, each stage) in seconds for a batch of any kind."""
        tokens, squares, batch, context = composition(items, self.padded)
        if not tokens:
            seconds = self.coefficients.decodes(batch, context)
        elif not batch:
            seconds = self.coefficients.prompts(tokens, squares)
        else:
            seconds = self.coefficients.mixed(tokens, squares, batch, context)
        return self._host(tokens, batch), self._stage(seconds)

    def prompts(self, lengths: Sequence[int]) -> float:
        """Seconds from the start of a batch of whole prompts to its tokens."""
        if self.padded:
            lengths = [max(lengths)] * len(lengths)
        tokens, squares = sum(lengths), sum(n * n for n in lengths)
        return self._total(self._host(tokens, len(lengths)), self.coefficients.prompts(tokens, squares))

    def decodes(self, batch: int, context: float) -> float:
        """Seconds from the start of a step that decodes `batch` sequences to its tokens."""
        return self._total(self._host(0, batch), self.coefficients.decodes(batch, context))

    def knee(self) -> int:
        """Lm, in tokens."""
        return knee({size: self.prompts([size]) for size in SIZES}, SIZES[-1])

    def run(self, batch: int, context: float) -> Run:
        """Of an instance of one stage, host included."""
        assert self.pp == 1, "steps of a pipeline overlap: drive them one by one"
        run = self.coefficients.run(batch, context)
        return Run(self._host(0, batch) + self._stage(run.seconds), run.growth * self.share, run.steps)

    def _host(self, tokens: int, sequences: int) -> float:
        step = self.prompt_step if tokens else self.decode_step
        return step.per_step + step.per_token * tokens + step.per_sequence * sequences

    def _stage(self, seconds: float) -> float:
        return seconds * self.share + (self.handover if self.pp > 1 else 0.0)

    def _total(self, host: float, seconds: float) -> float:
        return host + self.pp * self._stage(seconds)


def composition(items: Iterable[tuple[Scheduled, int]], padded: bool = False) -> tuple[int, int, int, int]:
    """(prompt tokens, their squares, decoding sequences, their context) of a batch."""
    tokens = squares = batch = context = prompts = longest = 0
    for sequence, n in items:
        computed = sequence.num_computed
        if n == 1 and computed:
            batch += 1
            context += computed + 1
        else:
            tokens += n
            squares += n * (2 * computed + n)
            prompts += 1
            longest = max(longest, n)
    if padded and prompts > 1:
        tokens, squares = prompts * longest, prompts * longest * longest
    return tokens, squares, batch, context


def interpolate(points: Points, x: float) -> float:
    """Linear between neighbours; the value of the outermost point beyond it."""
    at = bisect_right(points, x, key=_from_batch)
    if at == 0 or at == len(points):
        return points[max(0, at - 1)][1]
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _slope(points: Points, x: float) -> float:
    at = bisect_right(points, x, key=_from_batch)
    if at == 0 or at == len(points):
        return 0.0
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return (y1 - y0) / (x1 - x0)


def _from_batch(row: tuple[float, object] | DecodeLine) -> float:
    return row[0]
