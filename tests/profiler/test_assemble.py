"""From findings to a costs file that the simulator takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.costs import format
from distserve.costs.profile import Profile
from distserve.errors import UsageError
from distserve.plan import InstanceSpec, Plan, Role
from distserve.profiler import assemble
from distserve.profiler.assemble import Heading
from distserve.profiler.live import Around
from distserve.profiler.phases import Findings, Turn
from distserve.profiler.series import Series

HEADING = Heading(
    device="cpu",
    dtype="bfloat16",
    date="2026-11-22",
    source="distserve profile",
    model="demo",
    degree="1x1",
    fingerprint="a machine",
    versions="none",
    memory=8 << 30,
    block_size=32,
    token_bytes=23_040,
    kv_memory=1 << 30,
)


def series(seconds: float) -> Series:
    return Series([seconds] * 4)


def decode_seconds(batch: int, context: float) -> float:
    return 0.016 + 2e-6 * context + 4e-4 * batch


def findings() -> Findings:
    found = Findings()
    for n in (32, 128, 512, 1024, 2048):
        found.prompts[n,] = series(0.016 + 2e-4 * n + 1e-7 * n * n)
    found.prompts[64, 64] = series(0.016 + 2e-4 * 128 + 1e-7 * 2 * 64 * 64)
    for batch in (1, 8, 64):
        for context in (32, 512):
            found.decodes[batch, context] = series(decode_seconds(batch, batch * context))
            found.contexts[batch, context] = batch * context
    found.mixed[0, 100, 20, 100] = series(0.016 + 2e-4 * 100 + 1e-7 * 1e4 + 4e-4 * 20 + 2e-6 * 2000)
    found.beside = {("prefill", "decode"): [Turn([0.1], [0.11])], ("decode", "prefill"): [Turn([0.02], [0.019])]}
    per_byte = 1 / 6e9
    for size in (737_280, 20 * 737_280):
        found.publish[size], found.pull[size] = series(size * per_byte / 3), series(1e-4 + size * per_byte * 2 / 3)
    found.around = Around(
        request={16: series(0.004), 1024: series(0.004 + 1008e-6)},
        hand_off={n: series(0.003 + -(-n // 32) * 32 * 23_040 * per_byte) for n in (16, 1024)},
        host={1: series(0.0006), 32: series(0.0006 + 31 * 2e-5)},
    )
    return found


def leaves(value: Any) -> Iterator[Any]:
    for each in value.values() if isinstance(value, Mapping) else value:
        yield from leaves(each) if isinstance(each, Mapping | list) else [each]


def test_what_was_measured_is_what_a_simulator_reads() -> None:
    table = json.loads(format.text(assemble.table(findings(), HEADING)))
    costs = Profile.from_dict(table, "costs.json").costs("smollm2-135m-instruct", device="cpu")
    latency, engine = costs.latency(1, 1), costs.engine
    assert latency.coefficients.prompts(512, 512**2) == pytest.approx(0.016 + 2e-4 * 512 + 1e-7 * 512**2)
    assert latency.coefficients.decodes(8, 4096) == pytest.approx(decode_seconds(8, 4096))
    assert latency.coefficients.mixed_added == pytest.approx(1.0)
    assert engine.request == pytest.approx(0.004 - 16e-6 - 0.00058, rel=1e-3)
    assert (engine.prompt_step.per_step, engine.prompt_step.per_sequence) == pytest.approx((0.00058, 2e-5), rel=1e-3)
    assert engine.prompt_step.per_token == pytest.approx(1e-6, rel=1e-3)
    assert engine.decode_step.per_step == pytest.approx(0.00058, rel=1e-3)
    assert engine.decode_step.per_sequence == pytest.approx(2e-5, rel=1e-3)
    assert engine.publish == pytest.approx(0, abs=1e-9)
    assert engine.publish_bandwidth == pytest.approx(18e9, rel=1e-3)
    assert engine.pull_bandwidth == pytest.approx(6e9, rel=1e-3)
    assert engine.pull == pytest.approx(0.003, rel=1e-3)
    assert costs.kv_blocks(1, 1) == (1 << 30) // (32 * 23_040)
    assert table["engine"]["prefill_beside"] == {"decode": 1.1}
    assert table["engine"]["decode_beside"] == {"prefill": 1.0}  # nothing gets faster beside others
    errors = table["models"]["demo"]["1x1"]["error"]
    assert errors["prefill"]["left_out_mean"] < 1e-3
    assert errors["mixed"]["max"] < 1e-3


def test_a_slow_spell_beside_a_neighbour_is_not_the_neighbours() -> None:
    found = findings()
    within, beginning, both = ([0.1] * 12, [0.104] * 4 + [0.2] * 20), ([0.1] * 9, [0.2] * 9), ([0.2] * 9, [0.208] * 9)
    found.beside["prefill", "decode"] = [Turn(*turn) for turn in (within, beginning, both)]
    assert assemble.beside(found)["prefill_beside"] == {"decode": 1.04}


def test_a_file_says_when_another_machine_is_meant() -> None:
    profile = Profile.from_dict(assemble.table(findings(), HEADING), "costs.json")
    assert profile.elsewhere("a machine") == ""
    assert "distserve profile" in profile.elsewhere("another")
    costs = profile.costs("demo")
    costs.elsewhere = (profile.elsewhere("another"),)
    assert any("a machine" in note for note in costs.notes(1, 1, 1))
    with pytest.raises(UsageError, match="gpt2"):
        profile.costs("gpt2")


def test_half_a_profile_is_a_file_where_a_fit_can_be_made() -> None:
    found = findings()
    found.mixed, found.beside, found.publish, found.pull, found.around = {}, {}, {}, {}, Around()
    assert assemble.missing(found) == ""
    table = assemble.table(found, HEADING)
    format.read(table, "costs.json")
    assert "pull_bandwidth" not in table["engine"]
    found.decodes = dict(list(found.decodes.items())[:1])
    assert assemble.missing(found) == "2 more steps that decode"


def test_it_can_be_simulated() -> None:
    from distserve.sim.simulate import simulate
    from distserve.workload import Workload

    costs = Profile.from_dict(assemble.table(findings(), HEADING), "costs.json").costs("demo")
    plan = Plan((InstanceSpec(Role.PREFILL), InstanceSpec(Role.DECODE)))
    report = simulate(plan, Workload.load("sharegpt").draw(0.5, 50, seed=0).clipped(2048), costs)
    assert report.attainment.joint == 1.0


@given(st.dictionaries(st.integers(0, 4096), st.floats(0, 10), min_size=1, max_size=6))
def test_a_line_of_times_is_never_negative(points: dict[int, float]) -> None:
    start, slope = assemble.line(points)
    assert start >= 0
    assert slope >= 0
    assert all(start + slope * x >= 0 for x in points)


def test_numbers_have_no_more_digits_than_a_clock() -> None:
    for value in leaves(assemble.table(findings(), HEADING)["engine"]):
        assert not isinstance(value, float) or len(f"{value:g}") <= 13
