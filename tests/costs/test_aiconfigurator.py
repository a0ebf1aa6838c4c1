"""Operator tables become coefficients. The package itself is optional: what is sampled here is a roofline."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.catalogue import model_spec
from distserve.costs.aiconfigurator import BATCHES, CONTEXTS, PROMPTS, NoTables, coefficients, sampled
from distserve.costs.devices import device
from distserve.costs.roofline import coefficients as roofline
from distserve.errors import PlanError

INSTALLED = importlib.util.find_spec("aiconfigurator_core") is not None
QWEN = model_spec("Qwen/Qwen3-8B")
LINES = roofline(QWEN, device("h200"))


def prefill(batch: int, tokens: int) -> float:
    """A roofline with a staircase, as tiles of a matrix product make it."""
    stairs = 2e-4 * (-(-batch * tokens // 256) % 3)
    return LINES.prompts(batch * tokens, batch * tokens**2) + stairs


def decode(batch: int, tokens: int) -> float:
    return LINES.decodes(batch, batch * tokens)


def test_prompts_take_what_was_sampled() -> None:
    found = sampled(prefill, decode)
    for n in PROMPTS:
        assert found.prompts(n, n * n) == pytest.approx(prefill(1, n), rel=1e-9)
    for tokens in (96, 3000, 12_000):  # between samples: straight lines
        below = max(n for n in PROMPTS if n < tokens)
        assert prefill(1, below) < found.prompts(tokens, tokens**2) < prefill(1, 2 * below)
    assert found.prompts(16 * 128, 16 * 128**2) == pytest.approx(prefill(16, 128), rel=0.02)


def test_decode_steps_take_what_was_sampled() -> None:
    found = sampled(prefill, decode)
    for batch in BATCHES[:-1]:
        for each in CONTEXTS:
            assert found.decodes(batch, batch * each) == pytest.approx(decode(batch, each), rel=1e-6)
    assert found.decodes(48, 48 * 700) == pytest.approx(decode(48, 700), rel=1e-6)
    assert found.decodes(100, 100 * 700) == pytest.approx(decode(100, 700), rel=0.03)  # the roofline bends in between
    assert found.decodes(1024, 1024 * 700) == pytest.approx(decode(1024, 700), rel=0.03)  # goes on as it was


@given(st.lists(st.floats(0.001, 1.0), min_size=len(PROMPTS), max_size=len(PROMPTS)))
def test_any_samples_are_kept(seconds: list[float]) -> None:
    """Also such as no device would give: falling, jumping."""
    table = dict(zip(PROMPTS, seconds, strict=True))

    def jumps(batch: int, tokens: int) -> float:
        return table[tokens] if batch == 1 else 1.0

    found = sampled(jumps, decode)
    for n in PROMPTS:
        assert found.prompts(n, n * n) == pytest.approx(table[n], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: coefficients(QWEN, "l4"), "no tables of l4; it has a100-80g, h100-80g"),
        (lambda: coefficients(model_spec("facebook/opt-13b"), "h200"), "models no opt"),
        (lambda: coefficients(QWEN, "h200", dtype="float32"), "16-bit"),
        (lambda: coefficients(QWEN, "h200", 16), "end at tp = 8"),
    ],
)
def test_what_is_not_in_the_tables_is_said(call: Callable[[], object], words: str) -> None:
    with pytest.raises(NoTables, match=words):
        call()


def test_a_wrong_question_is_refused() -> None:
    with pytest.raises(PlanError, match="tp = 3 does not divide"):
        coefficients(QWEN, "h200", 3)
    with pytest.raises(PlanError, match="backend 'tgi' has no tables: one of vllm"):
        coefficients(QWEN, "h200", backend="tgi")


@pytest.mark.skipif(INSTALLED, reason="aiconfigurator-core is installed")
def test_without_the_package_its_name_is_said() -> None:
    with pytest.raises(NoTables, match=r"not installed \(pip install 'distserve\[gpu-tables\]'\)"):
        coefficients(QWEN, "h200")


@pytest.mark.skipif(not INSTALLED, reason="needs aiconfigurator-core (extra gpu-tables)")
def test_its_tables_agree_with_the_roofline_in_size() -> None:
    found, source = coefficients(QWEN, "h200")
    assert "vllm on h200_sxm" in source
    for n in (256, 1024, 4096):
        assert found.prompts(n, n * n) == pytest.approx(LINES.prompts(n, n * n), rel=0.25)
    for batch in (1, 16, 128):
        assert found.decodes(batch, batch * 1024) == pytest.approx(LINES.decodes(batch, batch * 1024), rel=0.25)
