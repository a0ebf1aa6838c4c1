"""The roofline against public fits of measurements, and against arithmetic by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.catalogue import model_spec
from distserve.costs.devices import catalogue, device
from distserve.costs.memory import allowed_tp
from distserve.costs.profile import Profile
from distserve.costs.roofline import EAGER, Efficiency, coefficients
from distserve.errors import PlanError

A100 = device("a100-80g")
IDEAL = Efficiency(1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)


def errors(phase: str) -> Iterator[tuple[str, float]]:
    """(where, ours over theirs less 1) over the range in which upstream measured, before upstream scaled its fits."""
    for model, by_tp in Profile.load("a100-80g-raw").models.items():
        for tp, theirs in by_tp.items():
            ours = coefficients(model_spec(model), A100, tp, efficiency=EAGER)
            if phase == "prefill":
                for n in (128, 256, 512, 1024, 2048):
                    yield f"{model} tp={tp} prompt={n}", ours.prompts(n, n * n) / theirs.prompts(n, n * n) - 1
                continue
            for batch in (1, 8, 32, 64, 94, 95, 128):
                for each in (256, 512, 1024):
                    where = f"{model} tp={tp} batch={batch} context={each}"
                    yield where, ours.decodes(batch, batch * each) / theirs.decodes(batch, batch * each) - 1


@pytest.mark.parametrize(("phase", "mean", "worst"), [("prefill", 0.05, 0.14), ("decode", 0.06, 0.4)])
def test_within_a_quarter_of_measured_fits(phase: str, mean: float, worst: float) -> None:
    """The few decode points beyond a quarter are where upstream's fit leaps at 95 sequences (OPT-66B, tp 2: from 105 to
    80 ms at 512 tokens of context each)."""
    found = dict(errors(phase))
    assert fmean(abs(error) for error in found.values()) < mean
    assert abs(fmean(found.values())) < 0.03
    outside = {where: error for where, error in found.items() if abs(error) > 0.25}
    assert len(outside) <= 0.05 * len(found), outside
    assert all(abs(error) < worst for error in found.values()), outside


def test_ideal_hardware_reaches_its_datasheet() -> None:
    spec = model_spec("facebook/opt-13b")
    found = coefficients(spec, A100, efficiency=IDEAL)
    matrices = 12 * 5120**2 * 40
    assert found.prompts(10_000, 0) == pytest.approx(10_000 * 2 * matrices / 312e12)
    assert found.prompts(1, 0) == pytest.approx((matrices + 50272 * 5120) * 2 / 2039e9)
    assert found.decodes(1, 0) == found.prompts(1, 0)
    assert found.decodes(2000, 0) == pytest.approx(2000 * 2 * (matrices + 50272 * 5120) / 312e12)
    assert found.decodes(1, 1000) - found.decodes(1, 0) == pytest.approx(1000 * 819_200 / 2039e9)
    assert found.prefill[0].per_square == pytest.approx(2 * 40 * 5120 / 312e12)


def test_ranks_share_the_work_and_pay_for_it() -> None:
    spec = model_spec("meta-llama/Llama-3.1-70B")
    one, four = (coefficients(spec, A100, tp, efficiency=replace(IDEAL, link=0.5)) for tp in (1, 4))
    sent = 2 * 80 * 8192 * 2 * 1.5 / (300e9 * 0.5)
    assert four.decodes(1, 0) == pytest.approx(one.decodes(1, 0) / 4 + sent)
    assert four.prompts(4096, 4096**2) == pytest.approx(one.prompts(4096, 4096**2) / 4 + 4096 * sent)
    bridged = coefficients(spec, replace(A100, bridged=True), 4, efficiency=replace(IDEAL, link=0.5))
    assert bridged.decodes(1, 0) == pytest.approx(one.decodes(1, 0) / 4 + 3 * sent)


def test_kv_heads_fewer_than_ranks_are_read_by_each() -> None:
    spec = model_spec("meta-llama/Llama-3.1-70B")
    eight, sixteen = (coefficients(spec, A100, tp).decode[0].per_context for tp in (8, 16))
    assert eight == sixteen


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(PlanError, match="tp = 3 does not divide"):
        coefficients(model_spec("facebook/opt-13b"), A100, 3)
    with pytest.raises(PlanError, match="dtype 'fp8' is not known"):
        coefficients(model_spec("facebook/opt-13b"), A100, dtype="fp8")


def test_32_bits_cost_twice() -> None:
    spec = model_spec("gpt2")  # whose checkpoint is in float32
    wide, narrow = (coefficients(spec, A100, dtype=dtype, efficiency=IDEAL) for dtype in (None, "float16"))
    assert wide.prompts(4096, 4096**2) == pytest.approx(2 * narrow.prompts(4096, 4096**2))
    assert wide.decodes(1, 100) == pytest.approx(2 * narrow.decodes(1, 100))


@given(
    name=st.sampled_from(["facebook/opt-66b", "Qwen/Qwen3-8B", "meta-llama/Llama-3.1-70B", "demo"]),
    kind=st.sampled_from(sorted(catalogue())),
    eager=st.booleans(),
    data=st.data(),
)
def test_more_work_never_takes_less(name: str, kind: str, eager: bool, data: st.DataObject) -> None:
    spec = model_spec(name)
    tp = data.draw(st.sampled_from([tp for tp in allowed_tp(spec) if tp <= 8]))
    found = coefficients(spec, device(kind), tp, efficiency=EAGER if eager else Efficiency())
    n, more = data.draw(st.integers(1, 8192)), data.draw(st.integers(1, 8192))
    assert 0 < found.prompts(n, n * n) < found.prompts(n + more, (n + more) ** 2)
    batch, extra, context = (data.draw(st.integers(1, 512)) for _ in range(3))
    assert 0 < found.decodes(batch, context) < found.decodes(batch + extra, context) + 1e-12
    assert found.decodes(batch, context) < found.decodes(batch, context + more)
    assert found.prefill[0].per_square == found.prefill[1].per_square > 0
