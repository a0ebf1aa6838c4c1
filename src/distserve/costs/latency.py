"""How long a batch takes on one instance, in closed form. Knows coefficients, not where they come from (a measurement,
a published fit, a roofline), and no device.

A step computes new tokens for sequences that are prompts (or pieces of them) and for sequences that decode:

    prefill    max over lines of   base + per_token * sum(n) + per_square * sum((p + n)^2 - p^2)
    decode     by batch size       base + per_context * sum(context) + per_sequence * batch

n new tokens after p computed ones; context counts the new token. For whole prompts these are the sums of lengths and of
their squares (DistServe, OSDI'24, appendix A). A mixed step reads the weights once: its products cost what the more
expensive of the two formulas says, with prompt and decode rows together in the first, and both attentions are added.
Where mixed steps were measured, a share (`mixed_added`) of the decoding sequences' time comes on top.

Where points were measured, what they differ from the formula (the rest) is interpolated linearly between them and
added, so that a measured step takes exactly what was measured: for prompts by their tokens and their effective number
sum(n)^2 / sum(n^2), which is the number of equal ones; for decoding by batch size and context. A mixed step gets the
rest of the formula that its products follow. Seconds and tokens throughout.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple

from distserve.knee import SIZES, knee
from distserve.sched.base import Sequence as Scheduled
from distserve.sched.base import composition


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


class Run:
    """A decode batch whose members stay: a step takes `seconds`, and each further one `growth` more than the one before
    it, for `steps` steps at least."""

    __slots__ = ("growth", "seconds", "steps")

    def __init__(self, seconds: float, growth: float, steps: float) -> None:
        self.seconds = seconds
        self.growth = growth
        self.steps = steps


class _Line:
    """A decode line, at hand."""

    __slots__ = ("base", "from_batch", "per_context", "per_sequence")

    def __init__(self, line: DecodeLine) -> None:
        self.from_batch, self.base, self.per_context, self.per_sequence = line

    def values(self) -> tuple[int, float, float, float]:
        return self.from_batch, self.base, self.per_context, self.per_sequence


Points = tuple[tuple[float, float], ...]  # (x, y) by x
# (key, points) by key. Two rows may have one key: the first ends what lies below it, the second begins what lies above.
Rows = tuple[tuple[float, Points], ...]
EVER: Final = float("inf")
LEAST: Final = 1e-6  # of the formula: no prompts take less, whatever the rest says of their neighbours


class Table:
    """Rows, laid out to be looked up: linear between points and between rows, the outermost value beyond them."""

    __slots__ = ("_keys", "_rows")

    def __init__(self, rows: Rows) -> None:
        self._keys = [key for key, _ in rows]
        self._rows = [
            ([x for x, _ in points], [y for _, y in points], [_rise(p, q) for p, q in pairwise(points)])
            for _, points in rows
        ]

    def piece(self, key: float, x: float) -> tuple[float, float, float]:
        """(value, slope by x, x until which the slope holds)."""
        keys = self._keys
        at = bisect_right(keys, key)
        if not at:
            return self._of_row(0, x)
        low = keys[at - 1]
        if low == key or at == len(keys):
            return self._of_row(at - 1, x)
        share = (key - low) / (keys[at] - low)
        value, slope, until = self._of_row(at - 1, x)
        above, rise, end = self._of_row(at, x)
        return value + share * (above - value), slope + share * (rise - slope), min(until, end)

    def _of_row(self, row: int, x: float) -> tuple[float, float, float]:
        xs, ys, slopes = self._rows[row]
        at = bisect_right(xs, x)
        if not at:
            return ys[0], 0.0, xs[0]
        if at == len(xs):
            return ys[-1], 0.0, EVER
        slope = slopes[at - 1]
        return ys[at - 1] + slope * (x - xs[at - 1]), slope, xs[at]


def _rise(point: tuple[float, float], following: tuple[float, float]) -> float:
    return (following[1] - point[1]) / (following[0] - point[0])


@dataclass(frozen=True, slots=True)
class Coefficients:
    """All layers in one pass, at one tensor parallelism."""

    prefill: tuple[PrefillLine, ...]  # the one that gives most counts
    decode: tuple[DecodeLine, ...]  # by from_batch
    prefill_rest: Rows = ()  # by effective number of prompts: (tokens, measured less formula)
    decode_rest: Rows = ()  # by batch size: (summed context, measured less formula)
    # Of mixed steps: 0: their products cost what the more expensive part says; 1: prompts and sequences are added
    mixed_added: float = 0.0
    _lines: list[_Line] = field(init=False, repr=False, compare=False)  # `decode`, to be looked up
    _prefill_table: Table | None = field(init=False, repr=False, compare=False)
    _decode_table: Table | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "_lines", [_Line(line) for line in self.decode])
        put(self, "_prefill_table", Table(self.prefill_rest) if self.prefill_rest else None)
        put(self, "_decode_table", Table(self.decode_rest) if self.decode_rest else None)

    def __reduce__(self) -> tuple[object, ...]:
        return Coefficients, (self.prefill, self.decode, self.prefill_rest, self.decode_rest, self.mixed_added)

    def prompts(self, tokens: float, squares: float) -> float:
        """Seconds to compute `tokens` prompt tokens, sum of squares `squares`."""
        if len(self.prefill) == 1:
            base, per_token, per_square = self.prefill[0]
            seconds = base + per_token * tokens + per_square * squares
        else:
            seconds = max([line(tokens, squares) for line in self.prefill])
        return seconds if self._prefill_table is None else seconds + self._prefill_rest(tokens, squares, seconds)

    def _prefill_rest(self, tokens: float, squares: float, seconds: float) -> float:
        assert self._prefill_table is not None
        rest = self._prefill_table.piece(tokens * tokens / squares if squares else 1.0, tokens)[0]
        return max(rest, (LEAST - 1) * seconds)

    def decode_line(self, batch: int) -> DecodeLine:
        return DecodeLine(*self._line(batch).values())

    def _line(self, batch: int) -> _Line:
        lines = self._lines
        at = len(lines) - 1
        while at > 0 and lines[at].from_batch > batch:
            at -= 1
        return lines[at]

    def decodes(self, batch: int, context: float) -> float:
        """Seconds of a step that decodes `batch` sequences of `context` tokens together."""
        line = self._line(batch)
        seconds = line.base + line.per_context * context + line.per_sequence * batch
        return seconds if self._decode_table is None else seconds + self._decode_table.piece(batch, context)[0]

    def mixed(self, tokens: float, squares: float, batch: int, context: float) -> float:
        """Seconds of a step with both."""
        line = self._line(batch)
        prompts = max([p.base + p.per_token * (tokens + batch) for p in self.prefill])
        decodes = line.base + line.per_sequence * batch
        rest = 0.0
        if prompts >= decodes:
            if self._prefill_table is not None:
                rest = self._prefill_rest(tokens, squares, max([line(tokens, squares) for line in self.prefill]))
        elif self._decode_table is not None:
            rest = self._decode_table.piece(batch, context)[0]
        attention = min([p.per_square for p in self.prefill]) * squares + line.per_context * context
        products = max(prompts, decodes)
        if self.mixed_added:
            added = max([p.base + p.per_token * tokens for p in self.prefill]) + line.per_sequence * batch
            products += self.mixed_added * (added - products)
        return products + rest + max(0.0, attention)

    def run(self, batch: int, context: float) -> Run:
        """A batch that begins with `context` and grows by one token a sequence and step."""
        line = self._line(batch)
        seconds = line.base + line.per_context * context + line.per_sequence * batch
        if self._decode_table is None:
            return Run(seconds, line.per_context * batch, EVER)
        rest, slope, until = self._decode_table.piece(batch, context)
        steps = EVER if until == EVER else (until - context) // batch + 1
        return Run(seconds + rest, (line.per_context + slope) * batch, steps)


@dataclass(frozen=True, slots=True)
class Host:
    """What a step costs the processor that drives the device, before the device starts."""

    per_step: float = 0.0
    per_token: float = 0.0  # of a prompt in it
    per_sequence: float = 0.0

    def __reduce__(self) -> tuple[object, ...]:  # compiled, a frozen class is not copied field by field
        return Host, (self.per_step, self.per_token, self.per_sequence)


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

    def __reduce__(self) -> tuple[object, ...]:
        steps = self.prompt_step, self.decode_step, self.padded
        return Latency, (self.coefficients, self.pp, self.share, self.handover, *steps)

    def batch(
        self, items: list[tuple[Scheduled, int]], decoding: int = 0, their_context: int = 0
    ) -> tuple[float, float]:
        """(host, each stage) in seconds for a step of any kind: `items`, and beside them so many sequences that decode,
        with so many tokens of context together."""
        tokens, squares, batch, context = composition(items, self.padded)
        batch, context = batch + decoding, context + their_context
        if not tokens:
            step, seconds = self.decode_step, self.coefficients.decodes(batch, context)
        else:
            step = self.prompt_step
            if batch:
                seconds = self.coefficients.mixed(tokens, squares, batch, context)
            else:
                seconds = self.coefficients.prompts(tokens, squares)
        host = step.per_step + step.per_token * tokens + step.per_sequence * (len(items) + decoding)
        return host, seconds * self.share + self.handover if self.pp > 1 else seconds * self.share

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
        step, share = self.decode_step, self.share
        run.seconds = step.per_step + step.per_sequence * batch + run.seconds * share
        run.growth *= share
        return run

    def _host(self, tokens: int, sequences: int) -> float:
        step = self.prompt_step if tokens else self.decode_step
        return step.per_step + step.per_token * tokens + step.per_sequence * sequences

    def _stage(self, seconds: float) -> float:
        return seconds * self.share + (self.handover if self.pp > 1 else 0.0)

    def _total(self, host: float, seconds: float) -> float:
        return host + self.pp * self._stage(seconds)
