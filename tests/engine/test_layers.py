"""Layers: attention over pages, rotation, packed and tied weights; by kernels, by generic C and in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine import oracle
from tests.engine.oracle import EPSILON, Paged, distance
from tests.engine.support import multiplying_in
from torch import Tensor

from distserve.engine import kernels
from distserve.engine.layers import (
    GatedLinear,
    Head,
    Linear,
    MergedLinear,
    Rotary,
    StepLayout,
    VocabularyEmbedding,
    add_rms_norm,
    attention,
    rms_norm,
    rope_attention,
    silu_mul,
)
from distserve.errors import ModelError

HEADS = [(9, 3), (8, 8), (4, 1), (20, 1)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
same_fixture = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["tiles", "vectors", "generic", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each way in which a layer can be computed on this machine."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "load", lambda: None)
        yield "torch"
        return
    if kernels.load() is None:
        pytest.skip("no kernels: no C compiler, or switched off")
    with multiplying_in(None if request.param == "generic" else request.param) as chosen:
        monkeypatch.setattr(kernels, "load", lambda: chosen)
        yield request.param


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_attention(
    shape: tuple[int, int, int], num_heads: int, dtype: torch.dtype, lens: list[tuple[int, int]], window: int | None
) -> None:
    """One step of sequences (tokens in the step, tokens in all) against fp64, the cache's new content included."""
    num_kv_heads, dim, block_size = shape
    counts, contexts = [n for n, _ in lens], [n for _, n in lens]
    paged = Paged((num_kv_heads, dim, block_size), dtype, contexts)
    past = paged.history(counts)
    before = paged.layer.clone()
    rope, scale = Rotary(dim, 10000.0, 1024), dim**-0.5
    qkv = random(sum(counts), (num_heads + 2 * num_kv_heads) * dim, dtype=dtype, seed=3)
    heads = qkv.clone().view(len(qkv), -1, dim)
    got = rope_attention(qkv, rope, paged.layer, paged.step(counts), num_heads, num_kv_heads, scale, window)
    got = got.view(-1, num_heads, dim)

    for i, first in enumerate([0, *accumulate(counts)][:-1]):
        positions = list(range(contexts[i] - counts[i], contexts[i]))
        q, k, v = torch.split(heads[first : first + counts[i]], [num_heads, num_kv_heads, num_kv_heads], dim=1)
        new = torch.stack((oracle.rotated(rope, k, positions).to(dtype), v), dim=1)
        for position, expected in zip(positions, new, strict=True):
            slot = paged.slot(i, position)
            assert distance(slot, expected) < 2 * EPSILON[dtype]
            before[paged.tables[i][position // block_size], :, :, position % block_size] = slot
        cache = torch.cat((past[i], new))
        q = oracle.rotated(rope, q, positions).to(dtype)
        wanted = oracle.attention(q, cache[:, 0], cache[:, 1], positions, scale, window)
        assert distance(got[first : first + counts[i]], wanted) < TOLERANCE[dtype]
    assert torch.equal(before.view(torch.uint8), paged.layer.view(torch.uint8)), "no other slot may change"


lengths = st.tuples(st.integers(1, 40), st.integers(0, 560)).map(lambda n: (n[0], sum(n)))


@same_fixture
@given(
    heads=st.sampled_from(HEADS),
    dim=st.sampled_from([64, 80, 96, 128]),
    block_size=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    lens=st.lists(st.one_of(lengths, st.integers(1, 600).map(lambda n: (1, n))), min_size=1, max_size=4),
    window=st.sampled_from([None, 1, 50, 300]),
)
def test_attention_is_right(
    path: str,
    heads: tuple[int, int],
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    lens: list[tuple[int, int]],
    window: int | None,
) -> None:
    check_attention((heads[1], dim, block_size), heads[0], dtype, lens, window)


@pytest.mark.parametrize("dim", [8, 24, 320])
def test_unusual_head_sizes(path: str, dim: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_attention((2, dim, 16), 6, dtype, [(1, 30), (20, 20)], None)


def test_a_step_of_long_prompts(path: str) -> None:
    check_attention((3, 64, 32), 9, torch.bfloat16, [(300, 300), (1, 7), (140, 400)], None)


def test_a_sequence_without_tokens_in_the_step(path: str) -> None:
    check_attention((3, 64, 32), 9, torch.bfloat16, [(1, 40), (0, 33), (5, 5)], None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_rise_and_fall_by_hundreds(path: str, dtype: torch.dtype) -> None:
    """Early chunks fade to nothing beside later ones, and later ones beside earlier."""
    paged, count = Paged((2, 64, 32), dtype, [400]), 400
    q, v = random(count, 4, 64, dtype=dtype), random(count, 2, 64, dtype=dtype, seed=2)
    k = random(count, 2, 64, seed=1).float() * (torch.arange(count) / 40).sin()[:, None, None] * 40
    k = k.to(dtype)
    got = attention(q, k, v, paged.layer, paged.step([count]), 0.125).view(count, 4, 64)
    assert distance(got, oracle.attention(q, k, v, list(range(count)), 0.125, None)) < 4 * TOLERANCE[dtype]


def test_attention_without_rotation_is_the_same(path: str) -> None:
    paged, other = (Paged((2, 64, 32), torch.bfloat16, [50, 70]) for _ in range(2))
    for cache in (paged, other):
        cache.history([10, 1])
    q, k, v = random(11, 4, 64), random(11, 2, 64, seed=1), random(11, 2, 64, seed=2)
    still = Rotary(64, 10000.0, 128)
    still.cos.fill_(1)
    still.sin.fill_(0)
    fused = torch.cat((q, k, v), dim=1).view(11, -1)
    step = paged.step([10, 1])
    a = rope_attention(fused, still, other.layer, step, 4, 2, 0.125)
    b = attention(q, k, v, paged.layer, step, 0.125)
    assert torch.equal(a, b)
    assert torch.equal(paged.layer.view(torch.uint8), other.layer.view(torch.uint8))


# Whatever the batch and the pieces, the same bits


# plain torch promises no equal bits
exact = pytest.mark.parametrize("path", ["tiles", "vectors", "generic"], indirect=True)


def in_pieces(
    qkv: Tensor, pieces: list[int], shape: tuple[int, int, int], num_heads: int, window: int | None
) -> Tensor:
    num_kv_heads, dim, _ = shape
    paged, rope, outs, done = Paged(shape, qkv.dtype, [len(qkv)]), Rotary(dim, 10000.0, 1024), [], 0
    for count in pieces:
        rows = qkv[done : done + count].clone()
        done += count
        step = StepLayout.build([count], [done], paged.tables, shape[2])
        outs.append(rope_attention(rows, rope, paged.layer, step, num_heads, num_kv_heads, dim**-0.5, window))
    return torch.cat(outs)


@exact
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize(
    ("dim", "block_size", "window", "dtype"),
    [
        (64, 32, None, torch.bfloat16),
        (128, 16, 90, torch.bfloat16),
        (80, 64, None, torch.bfloat16),
        (64, 32, None, torch.float32),
        (24, 16, 140, torch.float32),
    ],
)
def test_prompts_do_not_depend_on_their_pieces(
    path: str, num_heads: int, num_kv_heads: int, dim: int, block_size: int, window: int | None, dtype: torch.dtype
) -> None:
    qkv = random(290, (num_heads + 2 * num_kv_heads) * dim, dtype=dtype)
    shape = (num_kv_heads, dim, block_size)
    whole = in_pieces(qkv, [290], shape, num_heads, window)
    for pieces in ([1] * 290, [128, 162], [100, 5, 1, 1, 183], [3] * 96 + [2]):
        assert torch.equal(in_pieces(qkv, pieces, shape, num_heads, window), whole), pieces[:5]


@exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences_do_not_depend_on_their_batch(path: str, dtype: torch.dtype) -> None:
    contexts = [1 + (i * 97) % 500 for i in range(32)]
    together = Paged((3, 64, 32), dtype, contexts)
    past, qkv, rope = together.history([1] * 32), random(32, 15 * 64, dtype=dtype), Rotary(64, 10000.0, 1024)
    batch = rope_attention(qkv.clone(), rope, together.layer, together.step([1] * 32), 9, 3, 0.125)
    for i in (0, 7, 31):
        alone = Paged((3, 64, 32), dtype, [contexts[i]], seed=i)
        for position, both in enumerate(past[i]):
            alone.slot(0, position).copy_(both)
        one = rope_attention(qkv[i : i + 1].clone(), rope, alone.layer, alone.step([1]), 9, 3, 0.125)
        assert torch.equal(one[0], batch[i])


@exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_does_not_depend_on_threads(path: str, dtype: torch.dtype) -> None:
    qkv = random(200, 15 * 64, dtype=dtype)
    alone = in_pieces(qkv, [150, 1, 49], (3, 64, 32), 9, None)
    library = kernels.load()
    assert library is not None
    library.set_num_threads(2)
    try:
        assert torch.equal(in_pieces(qkv, [150, 1, 49], (3, 64, 32), 9, None), alone)
    finally:
        library.set_num_threads(1)


@exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_so(path: str, dtype: torch.dtype) -> None:
    """A broken key reaches the tokens that see it and no others."""
    paged = Paged((2, 64, 32), dtype, [200])
    q, k, v = random(200, 4, 64, dtype=dtype), random(200, 2, 64, dtype=dtype), random(200, 2, 64, dtype=dtype, seed=2)
    k[150, 1, 3] = float("nan")
    got = attention(q, k, v, paged.layer, paged.step([200]), 0.125).view(200, 2, 2, 64)
    assert got[150:, 1].isnan().all()
    assert not got[:150].isnan().any()
    assert not got[:, 0].isnan().any()


@exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_value_reaches_the_tokens_that_see_it_alone(
    path: str, dtype: torch.dtype, window: int | None, broken: float
) -> None:
    shape, at = (2, 64, 32), 130
    qkv = random(200, 10 * 64, dtype=dtype)
    good = in_pieces(qkv, [200], shape, 6, window).view(200, 6, 64)
    qkv.view(200, 10, 64)[at, 9, 3] = broken  # a value of the second key/value head, which heads 3 to 5 share
    got = in_pieces(qkv, [200], shape, 6, window).view(200, 6, 64)
    seen = slice(at, 200 if window is None else at + window)
    assert not got[seen, 3:, 3].isfinite().any()
    got[seen, 3:, 3], good[seen, 3:, 3] = 0, 0
    assert torch.equal(got, good)
    assert torch.equal(
        in_pieces(qkv, [131, 69], shape, 6, window).nan_to_num(7), in_pieces(qkv, [200], shape, 6, window).nan_to_num(7)
    )


# Weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_packing_changes_no_result(path: str, dtype: torch.dtype, bias: bool) -> None:
    for layer in (
        Linear(70, 50, bias, dtype=dtype),
        MergedLinear(64, (32, 16, 16), bias, dtype=dtype),
        GatedLinear(70, 40, bias, dtype=dtype),
    ):
        layer.weight.data.copy_(random(layer.out_features, layer.in_features))
        if layer.bias is not None:
            layer.bias.data.copy_(random(layer.out_features, seed=1))
        x = random(9, layer.in_features, dtype=dtype, seed=2)
        before = layer(x)
        layer.pack()
        assert distance(layer(x), before) < 1e-2
        if path in ("tiles", "vectors") and dtype == torch.bfloat16:
            assert layer.weight.numel() == 0, "the weight must not be kept twice"


def test_parts_are_loaded_one_by_one() -> None:
    layer = MergedLinear(8, (4, 2), bias=True)
    layer.part(0).fill_(1)
    layer.part(1).fill_(2)
    layer.bias_part(1).fill_(3)
    assert layer.weight.sum(1).tolist() == [8, 8, 8, 8, 16, 16]
    assert layer.bias is not None
    assert layer.bias.tolist() == [0, 0, 0, 0, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head(path: str, dtype: torch.dtype, tied: bool) -> None:
    table, x = random(100, 48, dtype=dtype), random(5, 48, dtype=dtype, seed=1)
    embedding = VocabularyEmbedding(100, 48, dtype=dtype)
    head = Head(48, 100, tied=embedding if tied else None, dtype=dtype)
    for weight in (embedding.weight, head.out.weight if head.out is not None else embedding.weight):
        weight.data.copy_(table)
    embedding.pack()
    if head.out is not None:
        head.out.pack()
    ids = torch.tensor([99, 0, 17], dtype=torch.int32)
    assert torch.equal(embedding(ids), table[ids.long()].float())
    logits = head.logits(x)
    assert logits.dtype == torch.float32
    assert distance(logits, x.double() @ table.double().T) < 2 * EPSILON[dtype]
    assert not tied or not list(head.parameters()), "a tied head owns nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms_and_activation(path: str, dtype: torch.dtype) -> None:
    x, weight, residual = random(7, 90, dtype=dtype), random(90, dtype=dtype, seed=1), random(7, 90, seed=2).float()
    total = x.double() + residual.double()
    wanted = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    got, stream = add_rms_norm(x, residual, weight, 1e-6)
    assert got.dtype == dtype
    assert stream.dtype == torch.float32
    assert distance(stream, total) < 1e-6
    assert distance(got, wanted) < 4e-3
    assert distance(rms_norm(x, weight, 1e-6), F.rms_norm(x.double(), (90,), weight.double(), 1e-6)) < 4e-3
    gate, up = x.double().chunk(2, -1)
    assert distance(silu_mul(x), F.silu(gate) * up) < 4e-3


# Positions


def test_a_step_from_lists() -> None:
    step = StepLayout.build([3, 1, 2], [3, 17, 34], [[5], [2, 9], [7, 1, 4]], 16)
    assert step.positions.tolist() == [0, 1, 2, 16, 32, 33]
    assert step.query_starts.tolist() == [0, 3, 4, 6]
    assert step.block_tables.tolist() == [[5, 0, 0], [2, 9, 0], [7, 1, 4]]
    assert step.slots.tolist() == [80, 81, 82, 144, 64, 65]
    assert (step.max_query_len, step.max_context_len) == (3, 34)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_scaled_frequencies_equal_transformers(scaling: dict[str, object]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_theta": 10000.0, **scaling}
    config = LlamaConfig(
        hidden_size=576, num_attention_heads=9, max_position_embeddings=1024, rope_parameters=parameters
    )
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    angles = torch.arange(1024.0)[:, None] * frequencies
    rope = Rotary(64, 10000.0, 1024, scaling)
    assert torch.equal(rope.cos, angles.cos() * magnitude)
    assert torch.equal(rope.sin, angles.sin() * magnitude)


@pytest.mark.parametrize("position", [127, 128, 129, 400])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "short_factor": [1.0 + i / 100 for i in range(32)],
            "long_factor": [1.0 + i for i in range(32)],
        },
    ],
    ids=lambda scaling: str(scaling["rope_type"]),
)
def test_scaling_by_length_turns_each_token_as_transformers_turns_a_sequences_last(
    scaling: dict[str, object], position: int
) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    context = 128 if scaling["rope_type"] == "dynamic" else 512
    parameters = {"rope_theta": 10000.0, **scaling}
    config = LlamaConfig(
        hidden_size=576, num_attention_heads=9, max_position_embeddings=context, rope_parameters=parameters
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor([[position]]))
    rope = Rotary(64, 10000.0, 512, {"original_max_position_embeddings": 128, **scaling})
    torch.testing.assert_close(rope.cos[position], cos[0, 0, :32], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rope.sin[position], sin[0, 0, :32], atol=1e-5, rtol=1e-5)


def test_scalings_that_cannot_be_served() -> None:
    with pytest.raises(ModelError, match="'proportional' is not supported"):
        Rotary(64, 10000.0, 512, {"rope_type": "proportional"})
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
    with pytest.raises(ModelError, match="8 short and 8 long factors for 32 frequencies"):
        Rotary(64, 10000.0, 512, {"rope_type": "longrope", "original_max_position_embeddings": 128, **factors})


def test_rotation_keeps_lengths_and_relative_angles() -> None:
    rope = Rotary(64, 10000.0, 512)
    q, k = random(1, 1, 64, dtype=torch.float32), random(1, 1, 64, dtype=torch.float32, seed=1)

    def product(a: int, b: int) -> float:
        turned = rope.rotate(q, torch.tensor([a])), rope.rotate(k, torch.tensor([b]))
        return float((turned[0] * turned[1]).sum())

    assert product(5, 3) == pytest.approx(product(405, 403), abs=1e-3)
    assert float(rope.rotate(q, torch.tensor([77])).norm()) == pytest.approx(float(q.norm()), rel=1e-5)
