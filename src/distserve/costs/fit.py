"""From measured steps to coefficients: least squares on the relative error of the formulas in `latency.py`, and what
the measurements differ from them. Knows no file and no engine: whoever measured hands over points.

    points --line(s)--> formula --rest--> Coefficients, exact at every point
           --left_out--> how far off a point is that the fit has not seen

The formulas' parts are times of work, so none may be negative: of all choices of parts, the best whose parts are all
positive is taken (non-negative least squares, exact for three parts). Same points, same fit, in any order.

Seconds and tokens. Steps are what the device computes: the host's part is a habit of the engine (`base.Host`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from statistics import fmean
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from distserve.costs.latency import Coefficients, DecodeLine, Points, PrefillLine, Rows
from distserve.errors import UsageError

FEWEST = 3  # points of a line
PROPORTION = 10  # a formula above so many times a point has nothing to do with it
EXACT = 1e-6  # relative errors below this are rounding: no second line is drawn for them


class PromptPoint(NamedTuple):
    """A measured step of whole prompts."""

    lengths: tuple[int, ...]
    seconds: float

    def composition(self, padded: bool) -> tuple[int, int]:
        """(tokens, their squares) that are computed."""
        lengths = [max(self.lengths)] * len(self.lengths) if padded else self.lengths
        return sum(lengths), sum(n * n for n in lengths)


class DecodePoint(NamedTuple):
    """A measured step that decodes."""

    batch: int
    context: int  # tokens, the new ones too, summed over the batch
    seconds: float


class MixedPoint(NamedTuple):
    """A measured step of a piece of a prompt beside sequences that decode."""

    computed: int  # tokens of the prompt before the piece
    new: int
    batch: int
    context: int  # of those that decode, summed
    seconds: float


@dataclass(frozen=True, slots=True)
class Error:
    """Of predictions, relative to what was measured."""

    mean: float  # of the formula alone, over all points
    max: float
    left_out_mean: float | None = None  # of points that the fit has not seen, one at a time; None: too few points
    left_out_max: float | None = None


Point = TypeVar("Point", PromptPoint, DecodePoint)


def fit(prompts: Sequence[PromptPoint], decodes: Sequence[DecodePoint], *, padded: bool = False) -> Coefficients:
    """Formulas, and what the points differ from them. Raises `UsageError` where there are fewer than `FEWEST` of a
    kind."""
    return with_rest((prefill_line(prompts, padded),), decode_lines(decodes), prompts, decodes, padded=padded)


def with_rest(
    prefill: tuple[PrefillLine, ...],
    decode: tuple[DecodeLine, ...],
    prompts: Sequence[PromptPoint],
    decodes: Sequence[DecodePoint],
    *,
    padded: bool = False,
) -> Coefficients:
    """These formulas, made exact at the points. A step measured twice takes the mean. Raises `UsageError` where a
    formula is out of all proportion to a point."""
    formula = Coefficients(prefill, decode)
    for prompt in prompts:
        _check(prompt, formula.prompts(*prompt.composition(padded)), f"prompts of {list(prompt.lengths)}")
    for step in decodes:
        _check(step, formula.decodes(step.batch, step.context), f"batch {step.batch}, context {step.context}")
    found: dict[float, dict[int, list[float]]] = {}
    for point in prompts:
        tokens, squares = point.composition(padded)
        found.setdefault(tokens * tokens / squares, {}).setdefault(tokens, []).append(
            point.seconds - formula.prompts(tokens, squares)
        )
    prefill_rest = tuple((key, _row(row, _prompts_of(formula, key))) for key, row in sorted(found.items()))
    return Coefficients(prefill, decode, prefill_rest, _decode_rest(formula, decodes))


def prefill_line(points: Sequence[PromptPoint], padded: bool = False) -> PrefillLine:
    """base + per_token * sum(n) + per_square * sum(n^2)."""
    _enough(points, "steps with prompts")
    parts = [(1, *point.composition(padded)) for point in points]
    return PrefillLine(*_least_squares(parts, [point.seconds for point in points]))


def decode_lines(points: Sequence[DecodePoint]) -> tuple[DecodeLine, ...]:
    """One line, or two with the first measured batch of the second as threshold, where that explains the points so much
    better that it is worth four more numbers (Schwarz's criterion)."""
    _enough(points, "steps that decode")
    batches = sorted({point.batch for point in points})
    best = _decode_line(points, 1)
    choice: tuple[DecodeLine, ...] = (best,)
    best_score = _score(_squares_of(best, points), len(points), 3)
    for threshold in batches[1:]:
        low = [point for point in points if point.batch < threshold]
        high = [point for point in points if point.batch >= threshold]
        if min(len(low), len(high)) < FEWEST:
            continue
        lines = _decode_line(low, 1), _decode_line(high, threshold)
        score = _score(_squares_of(lines[0], low) + _squares_of(lines[1], high), len(points), 7)
        if score < best_score:
            best_score, choice = score, lines
    return choice


def prefill_error(points: Sequence[PromptPoint], lines: tuple[PrefillLine, ...], padded: bool = False) -> Error:
    """Of the formula, without its rest."""
    return _error([max(line(*p.composition(padded)) for line in lines) / p.seconds - 1 for p in points])


def decode_error(points: Sequence[DecodePoint], lines: tuple[DecodeLine, ...]) -> Error:
    """Of the formula, without its rest."""
    formula = Coefficients((), lines)
    return _error([formula.decodes(p.batch, p.context) / p.seconds - 1 for p in points])


def mixed_added(points: Sequence[MixedPoint], coefficients: Coefficients) -> float:
    """`Coefficients.mixed_added` that comes closest to these steps, relative to them; 0 of none."""
    never, always = (_mixed(points, replace(coefficients, mixed_added=added)) for added in (0.0, 1.0))
    ways = [((b - a) / p.seconds, (p.seconds - a) / p.seconds) for a, b, p in zip(never, always, points, strict=True)]
    squares = math.fsum(way * way for way, _ in ways)
    if not squares:
        return 0.0
    return min(1.0, max(0.0, math.fsum(way * missing for way, missing in ways) / squares))


def mixed_error(points: Sequence[MixedPoint], coefficients: Coefficients) -> Error:
    """Of the formula of mixed steps."""
    predicted = _mixed(points, coefficients)
    return _error([seconds / p.seconds - 1 for seconds, p in zip(predicted, points, strict=True)])


def _mixed(points: Sequence[MixedPoint], coefficients: Coefficients) -> list[float]:
    return [coefficients.mixed(p.new, p.new * (2 * p.computed + p.new), p.batch, p.context) for p in points]


def prefill_left_out(points: Sequence[PromptPoint], padded: bool = False) -> Error:
    """Of the fit's formula, and of the prediction (rest included) of each point by a fit of the others."""
    error = prefill_error(points, (prefill_line(points, padded),), padded)
    return _with_left_out(error, prefill_unseen(points, padded))


def decode_left_out(points: Sequence[DecodePoint]) -> Error:
    """See `prefill_left_out`."""
    return _with_left_out(decode_error(points, decode_lines(points)), decode_unseen(points))


def prefill_unseen(points: Sequence[PromptPoint], padded: bool = False) -> list[float]:
    """Relative error at each point of a fit (rest included) of the others; empty where these are too few."""

    def predict(others: Sequence[PromptPoint], point: PromptPoint) -> float:
        line = (prefill_line(others, padded),)
        return with_rest(line, (), others, (), padded=padded).prompts(*point.composition(padded))

    return _unseen(points, predict)


def decode_unseen(points: Sequence[DecodePoint]) -> list[float]:
    """See `prefill_unseen`."""

    def predict(others: Sequence[DecodePoint], point: DecodePoint) -> float:
        return with_rest((), decode_lines(others), (), others).decodes(point.batch, point.context)

    return _unseen(points, predict)


def _unseen(points: Sequence[Point], predict: Callable[[Sequence[Point], Point], float]) -> list[float]:
    if len(points) <= FEWEST:
        return []
    errors = []
    for i, point in enumerate(points):
        others = [other for j, other in enumerate(points) if j != i]
        errors.append(predict(others, point) / point.seconds - 1)
    return errors


def _with_left_out(error: Error, errors: Sequence[float]) -> Error:
    if not errors:
        return error
    found = _error(errors)
    return Error(error.mean, error.max, found.mean, found.max)


def _error(errors: Sequence[float]) -> Error:
    sizes = [abs(error) for error in errors]
    return Error(fmean(sizes), max(sizes))


def _decode_rest(formula: Coefficients, points: Sequence[DecodePoint]) -> Rows:
    """Where a line begins at a measured batch, that batch has two rows, so that nothing leaps just below it. Below the
    smallest batch the formula is off by the same share as there, so that no time is negative."""
    found: dict[int, dict[int, list[float]]] = {}
    for point in points:
        found.setdefault(point.batch, {}).setdefault(point.context, []).append(point.seconds)
    lines = {line.from_batch: before for before, line in zip(formula.decode, formula.decode[1:], strict=False)}
    rows = []
    for batch, row in sorted(found.items()):
        for line in (lines[batch], formula.decode_line(batch)) if batch in lines else (formula.decode_line(batch),):
            alone = Coefficients((), (line,))
            rest = {context: [taken - alone.decodes(batch, context) for taken in row[context]] for context in row}
            rows.append((float(batch), _row(rest, partial(alone.decodes, batch))))
    if rows:
        smallest, row_points = int(rows[0][0]), rows[0][1]
        with_formula = [(x, y, formula.decodes(smallest, x)) for x, y in row_points]
        shares = [(x, y / seconds if y else 0.0) for x, y, seconds in with_formula]
        rows.insert(0, (0.0, tuple((x, share * formula.decodes(0, x)) for x, share in shares)))
    return tuple(rows)


def _row(rest: dict[int, list[float]], formula: Callable[[float], float]) -> Points:
    """Below the smallest point the formula is off by the same share as there, as with batches."""
    points = [(float(x), fmean(values)) for x, values in sorted(rest.items())]
    x, first = points[0]
    return ((0.0, first * formula(0.0) / formula(x)), *points)


def _prompts_of(formula: Coefficients, number: float) -> Callable[[float], float]:
    return lambda tokens: formula.prompts(tokens, tokens * tokens / number)


def _decode_line(points: Sequence[DecodePoint], from_batch: int) -> DecodeLine:
    found = _least_squares([(1, point.context, point.batch) for point in points], [point.seconds for point in points])
    return DecodeLine(from_batch, *found)


def _squares_of(line: DecodeLine, points: Sequence[DecodePoint]) -> float:
    formula = Coefficients((), (line,))
    return math.fsum((formula.decodes(p.batch, p.context) / p.seconds - 1) ** 2 for p in points)


def _score(squares: float, count: int, parameters: int) -> float:
    return count * math.log(squares / count + EXACT**2) + parameters * math.log(count)


def _least_squares(parts: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, float, float]:
    """The three non-negative factors whose weighted parts come closest to the seconds, relative to these. Parts that
    the points cannot tell apart get none, but the first of them."""
    order = sorted(range(len(seconds)), key=lambda i: (*parts[i], seconds[i]))  # sums do not depend on the order given
    rows = np.array([[part / seconds[i] for part in parts[i]] for i in order])
    scale = np.linalg.norm(rows, axis=0)
    rows = rows / scale
    ones = np.ones(len(order))
    best, best_error = np.zeros(3), math.inf
    for count in (1, 2, 3):  # of two that are as good the one with fewer parts is taken
        for chosen in combinations(range(3), count):
            found = _solve(rows[:, chosen], ones)
            if found is None or (found < 0).any():
                continue
            error = float(np.square(rows[:, chosen] @ found - ones).sum())
            if error < best_error * (1 - 1e-9) - 1e-28:
                best, best_error = np.zeros(3), error
                best[list(chosen)] = found
    a, b, c = best / scale
    return float(a), float(b), float(c)


def _solve(rows: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """None: the points do not tell these parts apart."""
    found, _, rank, _ = np.linalg.lstsq(rows, target, rcond=1e-10)
    return found.astype(np.float64) if rank == rows.shape[1] else None


def _enough(points: Sequence[object], what: str) -> None:
    if len(points) < FEWEST:
        raise UsageError(f"{len(points)} measured {what}: a fit needs {FEWEST} at least, of different sizes")


def _check(point: PromptPoint | DecodePoint, formula: float, what: str) -> None:
    if not 0 < formula <= PROPORTION * point.seconds:
        raise UsageError(
            f"a step of {what} took {point.seconds:g} seconds, and the formula says {formula:g}: the points contradict "
            f"each other or it; measure again"
        )
