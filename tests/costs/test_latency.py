"""Steps in closed form against the same steps one by one, and against what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.costs.latency import (
    EVER,
    Coefficients,
    DecodeLine,
    Host,
    Latency,
    PrefillLine,
    Rows,
    Table,
)
from distserve.sched.base import Sequence, composition

LINES = (DecodeLine(1, 0.02, 6e-7, 4e-5), DecodeLine(95, 0.007, 5.8e-7, 1.6e-4))
PLAIN = Coefficients((PrefillLine(0.018, 1e-4, 7e-9),), LINES)

seconds = st.floats(-0.005, 0.02)
points = st.lists(
    st.tuples(st.integers(0, 3000), seconds), min_size=1, max_size=6, unique_by=lambda point: point[0]
).map(lambda found: tuple(sorted((float(x), y) for x, y in found)))
rows = st.lists(st.tuples(st.integers(1, 130), points), min_size=1, max_size=5, unique_by=lambda row: row[0]).map(
    lambda found: tuple(sorted((float(batch), row) for batch, row in found))
)


def scheduled(computed: int, n: int) -> tuple[Sequence, int]:
    return Sequence(1, computed + n, num_computed=computed), n


# -- what a batch is made of -------------------------------------------------------------------------------------------


def test_composition_by_hand() -> None:
    assert composition([scheduled(9, 1), scheduled(0, 5), scheduled(4, 3)]) == (8, 25 + 7**2 - 4**2, 1, 10)
    assert composition([scheduled(9, 1), scheduled(19, 1)]) == (0, 0, 2, 30)
    assert composition([scheduled(0, 1)]) == (1, 1, 0, 0), "a prompt of one token is a prompt"


def test_padded_prompts_are_as_long_as_the_longest() -> None:
    assert composition([scheduled(0, 5), scheduled(0, 2)], padded=True) == (10, 50, 0, 0)
    assert composition([scheduled(0, 1), scheduled(0, 1)], padded=True) == (2, 2, 0, 0)
    assert composition([scheduled(0, 5), scheduled(3, 1)], padded=True) == (5, 25, 1, 4)


@given(st.lists(st.tuples(st.sampled_from([0, 0, 1, 7, 300]), st.sampled_from([1, 1, 2, 40])), min_size=1, max_size=8))
def test_composition_is_the_sum_of_its_sequences(batch: list[tuple[int, int]]) -> None:
    items = [scheduled(*each) for each in batch]
    alone = [composition([item]) for item in items]
    assert composition(items) == tuple(map(sum, zip(*alone, strict=True)))


# -- formulas ----------------------------------------------------------------------------------------------------------


def test_formulas_by_hand() -> None:
    assert PLAIN.prompts(300, 100**2 + 200**2) == pytest.approx(0.018 + 0.03 + 7e-9 * 50_000)
    assert PLAIN.decodes(94, 1000) == pytest.approx(0.02 + 6e-4 + 94 * 4e-5)
    assert PLAIN.decodes(95, 1000) == pytest.approx(0.007 + 5.8e-4 + 95 * 1.6e-4), "the second range begins here"


def test_the_line_that_gives_most_counts() -> None:
    found = Coefficients((PrefillLine(0.01, 0, 0), PrefillLine(0, 1e-4, 0)), LINES)
    assert [found.prompts(n, n * n) for n in (50, 100, 200)] == [0.01, 0.01, 0.02]


def test_a_mixed_step_reads_the_weights_once() -> None:
    mixed = PLAIN.mixed(200, 40_000, 10, 5000)
    assert mixed < PLAIN.prompts(200, 40_000) + PLAIN.decodes(10, 5000)
    assert mixed >= PLAIN.prompts(210, 40_000)
    assert PLAIN.mixed(1, 1, 94, 5000) >= PLAIN.decodes(94, 5000)


@given(st.integers(1, 128), st.integers(0, 4000), rows, rows)
def test_a_mixed_step_takes_the_rest_of_the_formula_it_follows(
    batch: int, more: int, prefill_rest: Rows, decode_rest: Rows
) -> None:
    found = Coefficients(PLAIN.prefill, LINES, prefill_rest, decode_rest)
    many, few = found.mixed(4000, 4000**2, batch, batch + more), found.mixed(2, 4, batch, batch + more)
    assert many - PLAIN.mixed(4000, 4000**2, batch, batch + more) == pytest.approx(
        found.prompts(4000, 4000**2) - PLAIN.prompts(4000, 4000**2)
    )
    if PLAIN.prefill[0](2 + batch, 0) < PLAIN.decodes(batch, 0):
        assert few - PLAIN.mixed(2, 4, batch, batch + more) == pytest.approx(
            found.decodes(batch, batch + more) - PLAIN.decodes(batch, batch + more)
        )


# -- tables ------------------------------------------------------------------------------------------------------------


def test_table_by_hand() -> None:
    table = Table(((1.0, ((0.0, 1.0), (10.0, 2.0))), (3.0, ((0.0, 5.0), (20.0, 5.0)))))
    assert table.piece(1, 5) == (1.5, 0.1, 10)
    assert table.piece(2, 5) == (3.25, 0.05, 10), "half way between the rows"
    assert table.piece(2, 15) == (3.5, 0.0, 20)
    assert table.piece(9, 99) == (5.0, 0.0, EVER), "beyond the outermost"
    assert table.piece(0.5, -1) == (1.0, 0.0, 0.0)


def test_two_rows_of_one_key_end_and_begin() -> None:
    flat = [(key, ((0.0, value),)) for key, value in ((1.0, 0.0), (2.0, 4.0), (2.0, 10.0), (3.0, 20.0))]
    table = Table(tuple(flat))
    assert [table.piece(key, 0)[0] for key in (1, 1.5, 2, 2.5, 3)] == [0, 2, 10, 15, 20]


@given(rows, st.floats(0, 140), st.floats(0, 3500))
def test_interpolation_stays_between_neighbours(table: Rows, key: float, x: float) -> None:
    values = [y for _, row in table for _, y in row]
    assert min(values) - 1e-12 <= Table(table).piece(key, x)[0] <= max(values) + 1e-12


@given(rows, st.integers(1, 130), st.floats(0, 3500))
def test_a_slope_holds_until_it_says(table: Rows, key: int, x: float) -> None:
    value, slope, until = Table(table).piece(key, x)
    assert until > x
    end = min(until, 10_000.0)
    for share in (0.25, 0.5, 1.0):
        there = x + share * (end - x)
        assert Table(table).piece(key, there)[0] == pytest.approx(value + slope * (there - x), abs=1e-9)


# -- a decode batch whose members stay ---------------------------------------------------------------------------------


@given(st.integers(1, 130), st.integers(0, 2000), rows)
def test_a_run_is_its_steps(batch: int, more: int, decode_rest: Rows) -> None:
    """Segment after segment, each as long as it claims to hold."""
    found = Coefficients(PLAIN.prefill, LINES, (), decode_rest)
    context, left = batch + more, 60
    while left:
        run = found.run(batch, context)
        assert run.steps >= 1
        steps = int(min(left, run.steps))
        for i in range(steps):
            assert run.seconds + i * run.growth == pytest.approx(found.decodes(batch, context + i * batch), abs=1e-9)
        context, left = context + steps * batch, left - steps


def test_without_points_a_run_never_ends() -> None:
    run = PLAIN.run(10, 1000)
    assert (run.seconds, run.steps) == (PLAIN.decodes(10, 1000), EVER)
    assert run.growth == pytest.approx(6e-6)


# -- an instance -------------------------------------------------------------------------------------------------------

HOST = Latency(PLAIN, prompt_step=Host(0.001, 1e-6, 1e-4), decode_step=Host(0.003, 0.0, 2e-4))


def test_host_and_stage_of_a_batch() -> None:
    host, stage = HOST.batch([scheduled(0, 100), scheduled(0, 200)])
    assert host == pytest.approx(0.001 + 300e-6 + 2e-4)
    assert host + stage == pytest.approx(HOST.prompts([100, 200]))
    host, stage = HOST.batch([scheduled(99, 1), scheduled(199, 1)])
    assert host == pytest.approx(0.003 + 4e-4)
    assert host + stage == pytest.approx(HOST.decodes(2, 300)) == pytest.approx(HOST.run(2, 300).seconds)
    host, stage = HOST.batch([scheduled(99, 1), scheduled(0, 50)])
    assert host == pytest.approx(0.001 + 50e-6 + 2e-4)
    assert stage == PLAIN.mixed(50, 2500, 1, 100)


def test_stages_share_the_layers_and_hand_over() -> None:
    latency = Latency(PLAIN, pp=2, share=0.5, handover=0.0025)
    host, stage = latency.batch([scheduled(99, 1)])
    assert host == 0.0
    assert stage == pytest.approx(PLAIN.decodes(1, 100) / 2 + 0.0025)
    assert latency.decodes(1, 100) == pytest.approx(2 * stage)


def test_padded_prompts_take_as_long_as_the_longest() -> None:
    padded = Latency(PLAIN, padded=True)
    assert padded.prompts([100, 300]) == HOST.coefficients.prompts(600, 2 * 300**2)
    assert padded.batch([scheduled(0, 100), scheduled(0, 300)])[1] == padded.prompts([100, 300])


def test_the_knee_of_a_device_that_saturates() -> None:
    assert Latency(Coefficients((PrefillLine(0.02, 1e-5, 0),), LINES)).knee() == 2048, "the largest that is tried"
    early = Coefficients((PrefillLine(0.001, 1e-4, 0),), LINES)
    assert Latency(early).knee() == 64  # 64 -> 128 tokens: 8,649 -> 9,275 tokens/s
