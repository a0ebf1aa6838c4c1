"""The phases against a device whose latency is known, because it is fake: the fit must find it."""

from __future__ import annotations

import pytest
from tests.profiler.direct import Direct, composition, direct
from tests.virtual import run

from distserve.costs import fit
from distserve.profiler import phases
from distserve.profiler.grid import Range
from distserve.profiler.messages import Decodes, Prompts, Took
from distserve.profiler.phases import SHARES, Budget, Findings
from distserve.profiler.series import Series
from distserve.sched.base import Batch

WITHIN = Range(longest_prompt=1024, longest_context=1024, kv_tokens=8192, largest_batch=64)


def linear(batch: Batch) -> float:
    tokens, squares, decoding, context = composition(batch)
    if not tokens:
        return 0.018 + 4e-7 * context + 0.0006 * decoding
    return max(0.015 + 2.4e-4 * (tokens + decoding), 0.018) + 5e-8 * squares + 4e-7 * context


def bent(batch: Batch) -> float:
    """A leap at 100 tokens; and the more sequences, and the more context, the less is added."""
    tokens, _, decoding, context = composition(batch)
    if tokens:
        return 0.02 + 1e-4 * tokens + (0.03 if tokens > 100 else 0.0)
    return float(0.002 * decoding**0.5 + 1e-4 * context**0.6)


def budget(seconds: float = 60.0) -> Budget:
    return Budget(seconds, lambda phase, left: None)


async def engine_phases(device: Direct, found: Findings, within: Range = WITHIN) -> None:
    limit = budget()
    limit.begin("steps")
    await phases.steps(device, within, found, limit)  # type: ignore[arg-type]  # answers as a Remote does


def test_a_known_latency_is_found() -> None:
    found = Findings()

    async def go() -> None:
        await engine_phases(await direct(linear), found)

    run(go())
    (line,) = fit.fit(found.prompt_points, found.decode_points).prefill
    assert line.base == pytest.approx(0.015, rel=1e-3)
    assert line.per_token == pytest.approx(2.4e-4, rel=1e-3)
    assert line.per_square == pytest.approx(5e-8, rel=1e-3)
    coefficients = fit.fit(found.prompt_points, found.decode_points)
    for batch, context in ((1, 200), (3, 1000), (24, 6000), (60, 7000)):
        assert coefficients.decodes(batch, context) == pytest.approx(0.018 + 4e-7 * context + 0.0006 * batch, rel=1e-3)
    assert fit.prefill_left_out(found.prompt_points).left_out_max == pytest.approx(0, abs=1e-4)
    assert fit.mixed_error(found.mixed_points, coefficients).max < 0.01
    assert all(series.settled for series in (*found.prompts.values(), *found.decodes.values()))


def test_more_points_lie_where_the_curve_bends() -> None:
    straight, curved = Findings(), Findings()
    within = Range(longest_prompt=256, longest_context=256, kv_tokens=2048, largest_batch=16)

    async def go() -> None:
        await engine_phases(await direct(linear), straight, within)
        await engine_phases(await direct(bent), curved, within)

    run(go())
    assert len(curved.prompts) > len(straight.prompts)
    assert len(curved.decodes) > len(straight.decodes)
    error = fit.decode_left_out(curved.decode_points).left_out_mean
    assert error is not None
    assert error < 0.05


def test_a_decode_step_is_timed_at_the_context_that_was_asked_for() -> None:
    seen: list[tuple[int, int]] = []

    def note(batch: Batch) -> float:
        seen.append((len(batch.items), composition(batch)[3]))
        return 0.001

    async def go() -> Took:
        return await (await direct(note)).ask(Decodes(4, 100, 5), Took)

    took = run(go())
    assert [batch for batch, _ in seen] == [4] * 6  # one of them warms up
    assert took.context == pytest.approx(400, abs=8)
    assert len(took.seconds) == 5


def test_a_step_leaves_nothing_behind() -> None:
    async def go() -> Direct:
        device = await direct(linear)
        await device.ask(Prompts([5, 20]), Took)
        await device.ask(Decodes(3, 40, 2), Took)
        return device

    assert not run(go()).steps._executor._known  # type: ignore[attr-defined]


def test_the_time_left_covers_this_phase_and_those_to_come() -> None:
    told: list[tuple[str, float]] = []
    limit = Budget(100.0, lambda phase, left: told.append((phase, left)))
    for phase in SHARES:
        limit.begin(phase)
    lefts = [left for _, left in told]
    assert [phase for phase, _ in told] == list(SHARES)
    assert lefts == sorted(lefts, reverse=True)
    assert lefts[0] == pytest.approx(100.0, abs=1)
    assert not limit.over()


def test_the_knee_is_of_prompts_alone() -> None:
    found = Findings(prompts={(n,): Series([0.01 * max(1, n / 256)]) for n in (32, 64, 128, 256, 512, 1024)})
    found.prompts[512, 512] = Series([9.9])
    assert found.knee(1024) == 256
