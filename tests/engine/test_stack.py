"""All blocks in one call: as the modules one by one compute, to rounding; the same to the last bit whatever the batch,
the cut of the prompt, the threads, and the rows that are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.oracle import distance
from tests.engine.support import CPU, load_model, make_checkpoint
from torch import Tensor

from distserve.engine import kernels
from distserve.engine.kv_cache import KVCache, private_buffer
from distserve.engine.layers import StepLayout
from distserve.engine.models.llama import Llama

SIZE, NUM_BLOCKS = 16, 40
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "one key head": {"num_key_value_heads": 1, "head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "widths that are no whole tiles": {"hidden_size": 72, "intermediate_size": 90, "num_attention_heads": 3,
                                       "num_key_value_heads": 3, "head_dim": 16},
}  # fmt: skip


def load(folder: Path, **changes: Any) -> Llama:
    family = changes.pop("family", "Llama")
    make_checkpoint(folder, family, **changes)
    model = load_model(folder, torch.bfloat16)
    assert isinstance(model, Llama)
    library = kernels.load()
    if library is None or not library.packs:
        assert model.stack is None
        pytest.skip("this processor has no bf16 vectors: modules are called one by one")
    assert model.stack is not None
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return load(tmp_path_factory.mktemp("model"))


def cache(model: Llama) -> KVCache:
    layout = model.spec.kv_layout(SIZE, "bfloat16")
    return KVCache(layout, NUM_BLOCKS, private_buffer(NUM_BLOCKS * layout.block_bytes), CPU)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(
    model: Llama, kv: KVCache, work: Sequence[tuple[list[int], int, list[int]]], rows: list[int] | None = None
) -> Tensor:
    """Hidden states; `work`: (tokens of this step, tokens before them, blocks) of each sequence."""
    lens = [len(tokens) for tokens, _, _ in work]
    contexts = [len(tokens) + before for tokens, before, _ in work]
    step = StepLayout.build(lens, contexts, [blocks for _, _, blocks in work], SIZE)
    ids = torch.tensor([token for tokens, _, _ in work for token in tokens], dtype=torch.int32)
    with torch.inference_mode():
        return model.forward(ids, step, kv.layers, None if rows is None else torch.tensor(rows))


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_modules_compute(case: str, tmp_path: Path) -> None:
    model = load(tmp_path, **CASES[case])
    check_against_modules(model)


def test_it_computes_what_the_modules_compute_with_a_window(tmp_path: Path) -> None:
    check_against_modules(load(tmp_path, family="Mistral", sliding_window=24))


def check_against_modules(model: Llama) -> None:
    stack, kvs, found = model.stack, [], []
    for form in (stack, None):
        model.stack = form
        kvs.append(cache(model))
        whole = run(model, kvs[-1], [(prompt(77), 0, [4, 1, 7, 2, 9])])
        found.append(torch.cat([whole, run(model, kvs[-1], [([5], 77, [4, 1, 7, 2, 9])])]))
    assert distance(found[0], found[1].double()) < 0.03
    assert distance(kvs[0].pool[[4, 1, 7, 2]], kvs[1].pool[[4, 1, 7, 2]].double()) < 0.03
    assert not kvs[0].pool[[0, 3, 5, 6]].any(), "a block that is not the sequence's was written"


@pytest.mark.parametrize("rows", [[0], [76], [76, 3, 4, 5], [5] * 40])
def test_rows_that_are_asked_for_are_those_of_all(model: Llama, rows: list[int]) -> None:
    work = [(prompt(77), 0, [4, 1, 7, 2, 9])]
    kv, other = cache(model), cache(model)
    assert torch.equal(run(model, kv, work, rows), run(model, other, work)[rows])
    assert torch.equal(kv.pool, other.pool)


def test_a_sequence_does_not_notice_its_batch_nor_how_it_was_cut(model: Llama) -> None:
    tokens, blocks = prompt(100), [4, 1, 7, 2, 9, 8, 0]
    alone = run(model, cache(model), [(tokens, 0, blocks)])
    kv = cache(model)
    parts = []
    for number, (first, last) in enumerate([(0, 31), (31, 32), (32, 99), (99, 100)]):
        other = (prompt(7 * number + 1, seed=number + 1), 0, [20 + number * 3, 21 + number * 3])
        both = run(model, kv, [other, (tokens[first:last], first, blocks)])
        parts.append(both[len(other[0]) :])
    assert torch.equal(torch.cat(parts), alone)


def test_threads_do_not_change_it(model: Llama) -> None:
    library = kernels.load()
    assert library is not None
    work = [(prompt(77), 0, [4, 1, 7, 2, 9]), (prompt(40, seed=1), 0, [10, 11, 12])]
    one = run(model, cache(model), work)
    try:
        library.set_num_threads(2)
        assert torch.equal(run(model, cache(model), work), one)
    finally:
        library.set_num_threads(1)


def test_another_cache_is_noticed(model: Llama) -> None:
    """The description of the blocks is kept between steps: it must be that of the cache at hand."""
    kvs = [cache(model), cache(model)]
    for seed, kv in enumerate(kvs):
        run(model, kv, [(prompt(16, seed=seed), 0, [3])])
    assert not torch.equal(kvs[0].pool[3], kvs[1].pool[3])
    assert kvs[0].pool[3].any()
