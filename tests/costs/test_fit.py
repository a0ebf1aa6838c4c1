"""Known coefficients are found again, measured points are kept, in between nothing leaps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.costs import fit
from distserve.costs.fit import DecodePoint, MixedPoint, PromptPoint
from distserve.costs.latency import Coefficients, DecodeLine, PrefillLine
from distserve.errors import UsageError

PROMPTS = [(n,) * count for n in (16, 64, 256, 1024, 2000) for count in (1, 2, 8)]
BATCHES = (1, 2, 4, 8, 16, 32, 64, 96, 128)
CONTEXTS = (16, 64, 256, 1024)  # a sequence

prefill_lines = st.builds(PrefillLine, st.floats(1e-3, 0.1), st.floats(1e-5, 1e-3), st.floats(0, 1e-7))
decode_lines = st.builds(DecodeLine, st.just(1), st.floats(1e-3, 0.1), st.floats(1e-8, 1e-5), st.floats(1e-6, 1e-3))
noise = st.integers(0, 10**6).map(random.Random)


def prompt_points(seconds: Callable[[float, float], float]) -> list[PromptPoint]:
    return [PromptPoint(lengths, seconds(sum(lengths), sum(n * n for n in lengths))) for lengths in PROMPTS]


def decode_points(seconds: Callable[[int, int], float]) -> list[DecodePoint]:
    return [DecodePoint(b, b * each, seconds(b, b * each)) for b in BATCHES for each in CONTEXTS]


def noisy(points: list[DecodePoint], source: random.Random) -> list[DecodePoint]:
    return [point._replace(seconds=point.seconds * source.uniform(0.8, 1.25)) for point in points]


# -- formulas ----------------------------------------------------------------------------------------------------------


@given(prefill_lines)
def test_a_prefill_line_is_found_again(line: PrefillLine) -> None:
    found = fit.prefill_line(prompt_points(line.__call__))
    for n in (1, 100, 1000, 5000):
        assert found(n, n * n) == pytest.approx(line(n, n * n), rel=1e-6)
    assert found.base == pytest.approx(line.base, rel=1e-6)


@given(decode_lines)
def test_a_decode_line_is_found_again_and_stays_alone(line: DecodeLine) -> None:
    found = fit.decode_lines(decode_points(Coefficients((), (line,)).decodes))
    assert len(found) == 1
    assert list(found[0]) == pytest.approx(list(line), rel=1e-6, abs=1e-12)


@given(decode_lines, decode_lines, st.sampled_from(BATCHES[2:-2]))
def test_two_ranges_are_found_again(low: DecodeLine, high: DecodeLine, threshold: int) -> None:
    truth = Coefficients((), (low, high._replace(from_batch=threshold)))
    points = decode_points(truth.decodes)
    found = Coefficients((), fit.decode_lines(points))
    for point in points:
        assert found.decodes(point.batch, point.context) == pytest.approx(point.seconds, rel=1e-4)
    if abs(low.base / high.base - 1) > 0.2 and abs(low.per_sequence / high.per_sequence - 1) > 0.2:
        assert [line.from_batch for line in found.decode] == [1, threshold]


def test_no_part_is_negative() -> None:
    """Where a free fit would say -3 ms of base, none is the best that work can take."""
    points = [PromptPoint((n,), -0.003 + 1e-4 * n) for n in (100, 200, 400, 800)]
    found = fit.prefill_line(points)
    assert found.base == 0.0
    assert min(found) >= 0
    assert fit.prefill_error(points, (found,)).max < 0.3


def test_parts_that_the_points_do_not_tell_apart_get_none() -> None:
    """One prompt a step and one batch size: there is no telling what a sequence costs."""
    (line,) = fit.decode_lines([DecodePoint(1, context, 0.01 + 1e-6 * context) for context in (10, 100, 1000)])
    assert list(line) == pytest.approx([1, 0.01, 1e-6, 0.0])
    same = fit.prefill_line([PromptPoint((128,), 0.01)] * 3)
    assert list(same) == pytest.approx([0.01, 0.0, 0.0])


def test_padded_prompts_are_fitted_as_they_are_computed() -> None:
    line = PrefillLine(0.01, 1e-4, 1e-8)
    points = [PromptPoint(pair, line(2 * pair[1], 2 * pair[1] ** 2)) for pair in ((1, 100), (7, 300), (50, 900))]
    assert fit.prefill_line(points, padded=True) == pytest.approx(line, rel=1e-6)
    found = fit.fit(points, decode_points(lambda b, c: 0.01 + 1e-6 * c), padded=True)
    assert found.prompts(1800, 2 * 900**2) == pytest.approx(points[-1].seconds)


@given(noise)
def test_the_order_of_points_is_no_matter(source: random.Random) -> None:
    prompts = prompt_points(lambda tokens, squares: 0.01 + 1e-4 * tokens * source.uniform(0.9, 1.1))
    decodes = noisy(decode_points(lambda b, c: 0.01 + 1e-6 * c + 1e-5 * b), source)
    before = fit.fit(prompts, decodes)
    source.shuffle(prompts)
    source.shuffle(decodes)
    assert fit.fit(prompts, decodes) == before


# -- points ------------------------------------------------------------------------------------------------------------


@given(noise)
def test_every_point_is_kept(source: random.Random) -> None:
    prompts = prompt_points(lambda tokens, squares: source.uniform(0.5, 2) * (0.01 + 1e-4 * tokens))
    decodes = noisy(decode_points(lambda b, c: 0.01 + 1e-6 * c + 1e-5 * b), source)
    found = fit.fit(prompts, decodes)
    for point in prompts:
        assert found.prompts(*point.composition(False)) == pytest.approx(point.seconds, rel=1e-9)
    for step in decodes:
        assert found.decodes(step.batch, step.context) == pytest.approx(step.seconds, rel=1e-9)


def test_a_step_measured_twice_takes_the_mean() -> None:
    decodes = [*decode_points(lambda b, c: 0.01 + 1e-6 * c), DecodePoint(1, 16, 0.03)]
    found = fit.fit(prompt_points(PrefillLine(0.01, 1e-4, 0).__call__), decodes)
    assert found.decodes(1, 16) == pytest.approx((0.010016 + 0.03) / 2)


@given(noise, st.floats(0, 1))
def test_a_decode_step_between_two_points_lies_between_them(source: random.Random, share: float) -> None:
    """Of the same batch, and of the same context in neighbouring batches, also where the second line begins."""
    slow = Coefficients((), (DecodeLine(1, 0.02, 1e-6, 1e-5), DecodeLine(64, 0.002, 1e-6, 4e-4)))
    points = noisy([DecodePoint(b, c, slow.decodes(b, c)) for b in BATCHES for c in (128, 1024, 9000)], source)
    found = fit.with_rest((), fit.decode_lines(points), (), points)
    for low, high in pairwise(points):
        if low.batch == high.batch:
            between = found.decodes(low.batch, low.context + share * (high.context - low.context))
            assert between == pytest.approx(low.seconds + share * (high.seconds - low.seconds), rel=1e-6)
    for low, high in zip(points, points[3:], strict=False):
        batch = low.batch + int(share * (high.batch - low.batch))
        bounds = sorted((low.seconds, high.seconds))
        assert bounds[0] * (1 - 1e-9) <= found.decodes(batch, low.context) <= bounds[1] * (1 + 1e-9)


@given(noise, st.floats(0, 1))
def test_a_prompt_between_two_points_is_no_slower_than_a_straight_line(source: random.Random, share: float) -> None:
    """And at most as much faster as the formula bends."""
    points = [PromptPoint((n,), source.uniform(0.8, 1.25) * PrefillLine(0.01, 1e-4, 1e-8)(n, n * n)) for n in CONTEXTS]
    line = fit.prefill_line(points)
    found = fit.with_rest((line,), (), points, ())
    for low, high in pairwise(points):
        (x,), (y,) = low.lengths, high.lengths
        n = x + share * (y - x)
        straight = low.seconds + share * (high.seconds - low.seconds)
        bend = line.per_square * (y - x) ** 2 / 4
        assert straight - bend - 1e-12 <= found.prompts(n, n * n) <= straight + 1e-12


@given(noise)
def test_no_step_takes_no_time(source: random.Random) -> None:
    """Also far from the points, and where they contradict each other by a factor of four."""
    decodes = [DecodePoint(b, b * c, source.uniform(0.5, 2) * 1e-4 * c) for b in (4, 8, 64) for c in (200, 900)]
    prompts = [PromptPoint((n,) * k, source.uniform(0.5, 2) * 1e-8 * n * n) for k in (1, 3) for n in (300, 500, 900)]
    found = fit.fit(prompts, decodes)
    assert all(found.decodes(b, b * c) > 0 for b in (1, 2, 4, 6, 8, 30, 64, 200) for c in (1, 200, 500, 5000))
    assert all(found.prompts(n, n * k) > 0 for k in (1, 2, 50, 2000) for n in (1, 2, 50, 2000, 10**6))


def test_a_formula_of_contexts_alone_is_kept_at_its_points() -> None:
    points = [DecodePoint(4, 400, 0.02), DecodePoint(8, 1600, 0.1)]
    found = fit.with_rest((), (DecodeLine(1, 0.0, 6e-5, 0.0),), (), points)
    assert [found.decodes(point.batch, point.context) for point in points] == pytest.approx([0.02, 0.1])
    assert 0 < found.decodes(1, 1) < 0.001


def test_points_out_of_all_proportion_are_refused() -> None:
    points = [PromptPoint((n,), seconds) for n, seconds in ((10, 1.0), (20, 20.0))]
    with pytest.raises(UsageError, match=r"a step of prompts of \[10\] took 1 seconds, and the formula says 20: "):
        fit.with_rest((PrefillLine(20.0, 0.0, 0.0),), (), points, ())
    with pytest.raises(
        UsageError, match=r"a step of batch 3, context 9 took 0.0001 seconds, and the formula says 0.5: "
    ):
        fit.with_rest((), (DecodeLine(1, 0.5, 0.0, 0.0),), (), [DecodePoint(3, 9, 1e-4)])


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors_by_hand() -> None:
    points = [DecodePoint(1, 10, 0.1), DecodePoint(1, 20, 0.125), DecodePoint(1, 30, 0.2)]
    error = fit.decode_error(points, (DecodeLine(1, 0.1, 0.0, 0.0),))
    assert error.mean == pytest.approx((0 + 0.2 + 0.5) / 3)
    assert error.max == pytest.approx(0.5)
    assert fit.prefill_error([PromptPoint((10,), 0.1)], (PrefillLine(0.11, 0.0, 0.0),)).max == pytest.approx(0.1)


def test_left_out_points_of_a_true_formula_are_predicted() -> None:
    prompts, decodes = (
        prompt_points(PrefillLine(0.01, 1e-4, 1e-8).__call__),
        decode_points(lambda b, c: 0.01 + 1e-6 * c),
    )
    for error in (fit.prefill_left_out(prompts), fit.decode_left_out(decodes)):
        assert error.left_out_max is not None
        assert max(error.max, error.left_out_max) < 1e-9


def test_a_point_that_nobody_would_expect_shows_in_the_left_out_error() -> None:
    decodes = decode_points(lambda b, c: 0.01 + 1e-6 * c)
    decodes[13] = decodes[13]._replace(seconds=2 * decodes[13].seconds)
    error = fit.decode_left_out(decodes)
    assert error.left_out_max is not None
    assert error.left_out_mean is not None
    assert 0.4 < error.left_out_max < 1.1
    assert error.left_out_mean < 0.1


def test_three_points_fit_and_leave_none_out() -> None:
    decodes = decode_points(lambda b, c: 0.01 + 1e-6 * c)[:3]
    assert fit.decode_left_out(decodes).left_out_mean is None
    with pytest.raises(UsageError, match="2 measured steps that decode: a fit needs 3 at least"):
        fit.decode_lines(decodes[:2])
    with pytest.raises(UsageError, match="0 measured steps with prompts"):
        fit.fit([], decodes)


def test_the_share_that_mixed_steps_add_is_found() -> None:
    formula = Coefficients((PrefillLine(0.016, 2e-4, 1e-7),), (DecodeLine(1, 0.015, 2e-6, 4e-4),))
    for added in (0.0, 0.4, 1.0):
        true = replace(formula, mixed_added=added)
        points = [
            MixedPoint(c, n, b, 200 * b, true.mixed(n, n * (2 * c + n), b, 200 * b))
            for c, n, b in ((0, 100, 4), (500, 200, 30), (0, 30, 60))
        ]
        assert fit.mixed_added(points, formula) == pytest.approx(added, abs=1e-9)
        assert fit.mixed_error(points, true).max == pytest.approx(0, abs=1e-12)
    assert fit.mixed_added([], formula) == 0.0
