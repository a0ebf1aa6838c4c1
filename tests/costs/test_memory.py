"""What fits: the published capacities of the DistServe paper's simulator, and arithmetic that can be done by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.catalogue import model_spec
from distserve.costs.devices import device
from distserve.costs.memory import (
    DISTSERVE,
    Accounting,
    allowed_pp,
    allowed_tp,
    capacity,
    kv_heads_per_rank,
    kv_token_bytes,
    stage_layers,
    weight_bytes,
)
from distserve.errors import PlanError

# KV tokens of an instance on A100-80GB: repository LLMServe/DistServe (Apache-2.0), commit 82831f1.
PUBLISHED = Path(__file__).with_name("kv_capacity_a100_80g.csv")
A100 = device("a100-80g").memory
OPT, LLAMA, QWEN = (model_spec(name) for name in ("facebook/opt-13b", "meta-llama/Llama-3.1-70B", "Qwen/Qwen2.5-7B"))


def test_published_capacities_to_the_token() -> None:
    rows = list(csv.DictReader(PUBLISHED.read_text().splitlines()))
    assert len(rows) == 76
    for row in rows:
        found = capacity(model_spec(row["model"]), A100, int(row["tp"]), int(row["pp"]), accounting=DISTSERVE)
        assert found.num_tokens == int(row["max_num_tokens"]), row


def test_every_weight_is_on_some_rank() -> None:
    """Stages and ranks together hold the model once, but for what is replicated."""
    for spec in (OPT, LLAMA, QWEN):
        whole = spec.weight_bytes("float16")
        assert whole - 4 * spec.hidden_size <= weight_bytes(spec, dtype="float16") <= whole  # all but the last norm
        halves = 2 * weight_bytes(spec, 2, dtype="float16")
        assert whole < halves < 1.01 * whole


def test_kv_of_a_token() -> None:
    assert kv_token_bytes(OPT, dtype="float16") == 819_200
    assert kv_token_bytes(OPT, 2, 4, "float16") == 819_200 // 8
    assert kv_token_bytes(LLAMA, 8) == 80 * 2 * 128 * 2
    assert kv_token_bytes(LLAMA, 16) == kv_token_bytes(LLAMA, 8)  # each KV head is on two ranks
    assert kv_heads_per_rank(LLAMA, 32) == 1
    assert kv_token_bytes(OPT, dtype="float32") == 2 * 819_200


def test_degrees_that_divide_the_model() -> None:
    assert allowed_tp(OPT) == (1, 2, 4, 5, 8, 10, 20, 40)
    assert allowed_tp(LLAMA) == (1, 2, 4, 8, 16, 32, 64)
    assert allowed_tp(QWEN) == (1, 2, 4)  # 28 heads, but neither does 7 divide 4 KV heads nor 4 divide 7
    assert 3 in allowed_tp(model_spec("facebook/opt-66b"))
    assert allowed_pp(OPT) == (1, 2, 4, 5, 8, 10, 20, 40)


def test_a_stage_too_long_limits_the_instance() -> None:
    assert stage_layers(OPT, 3) == (14, 13, 13)
    assert sum(stage_layers(LLAMA, 7)) == 80
    uneven, even = capacity(OPT, A100, 1, 3), capacity(OPT, A100, 1, 4)
    assert uneven.kv_token == 14 / 40 * 819_200
    assert uneven.num_tokens < even.num_tokens


def test_what_does_not_fit_says_by_how_much() -> None:
    big = capacity(LLAMA, A100)
    assert not big.fits
    assert big.num_tokens == 0
    room = 0.88 * A100
    assert big.missing == pytest.approx(big.weights + 16 * big.kv_token - room, abs=2)
    assert capacity(LLAMA, A100 + int(big.missing / 0.88) + 2).num_blocks == 1


def test_kv_memory_of_a_plan_is_a_limit() -> None:
    assert capacity(OPT, A100, kv_memory=1 << 30).num_blocks == (1 << 30) // (16 * 819_200)
    assert capacity(OPT, A100, kv_memory=0.1).num_blocks == int(0.1 * A100 // (16 * 819_200))
    assert capacity(OPT, A100, kv_memory=0.99) == capacity(OPT, A100)
    assert capacity(OPT, A100, kv_memory=1024).missing == 16 * 819_200 - 1024


@pytest.mark.parametrize(
    ("tp", "pp", "dtype", "words"),
    [
        (3, 1, None, "tp = 3 does not divide the model's 40 heads .* one of 1, 2, 4, 5"),
        (0, 1, None, "tp = 0"),
        (1, 0, None, "pp = 0"),
        (1, 41, None, "pp = 41 stages for a model of 40 layers: take 1 to 40"),
        (1, 1, "int3", "dtype 'int3' is not known: give one of bfloat16"),
    ],
)
def test_what_cannot_be_divided_is_refused(tp: int, pp: int, dtype: str | None, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        capacity(OPT, A100, tp, pp, dtype=dtype)


@given(
    spec=st.sampled_from([OPT, LLAMA, QWEN]),
    tp=st.sampled_from([1, 2, 4]),
    pp=st.integers(1, 28),
    memory=st.integers(1 << 30, 1 << 38),
    careful=st.booleans(),
)
def test_what_is_held_fits_and_a_block_more_does_not(
    spec: object, tp: int, pp: int, memory: int, careful: bool
) -> None:
    accounting = Accounting() if careful else DISTSERVE
    spec = spec if isinstance(spec, type(OPT)) else OPT
    found = capacity(spec, memory, tp, pp, accounting=accounting)
    room = (accounting.utilization - accounting.activation) * memory
    assert found.fits == (found.missing == 0)
    if found.fits:
        assert found.num_tokens * found.kv_token <= room
        more = capacity(spec, memory + (1 << 30), tp, pp, accounting=accounting)
        assert more.num_blocks >= found.num_blocks
    else:
        assert found.missing <= found.weights + 16 * found.kv_token + 1
