"""The runner: however work is cut into steps and mixed into batches, each request's tokens are what they are alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine.support import MiniScheduler, all_logits, greedy, load_model, make_checkpoint

from distserve.engine.models.base import Model
from distserve.request import FinishReason, Logprobs, Request, SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(path, num_hidden_layers=2)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def request(request_id: int, length: int, max_tokens: int = 6) -> Request:
    """Every third one greedy, the others sampled."""
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"top_p": 0.9}, {"temperature": 1.5, "frequency_penalty": 0.5}]
    params = SamplingParams(max_tokens=max_tokens, seed=request_id, ignore_eos=True, **kinds[request_id % 3])
    return Request(request_id, prompt_of(length, request_id), params)


@pytest.fixture(scope="module")
def alone(model: Model) -> dict[tuple[int, int], list[int]]:
    """The answer of each (id, prompt length) that the property below may ask about, computed by itself."""
    return {
        (i, n): [token.id for token in MiniScheduler(model).run([request(i, n)])[i]]
        for i in range(4)
        for n in (1, 16, 37)
    }


@settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_gives_the_same_tokens(
    data: st.DataObject, model: Model, alone: dict[tuple[int, int], list[int]]
) -> None:
    lengths = data.draw(st.lists(st.sampled_from([1, 16, 37]), min_size=1, max_size=4))
    block_size = data.draw(st.sampled_from([16, 32]))
    world = MiniScheduler(model, block_size=block_size, num_blocks=32)
    for i, length in enumerate(lengths):
        world.add(request(i, length))
    while world.sequences:
        chosen = data.draw(st.lists(st.sampled_from(sorted(world.sequences)), min_size=1, unique=True))
        work = []
        for i in chosen:
            sequence = world.sequences[i]
            left = sequence.num_tokens - sequence.num_computed
            work.append((i, data.draw(st.integers(1, left)) if left > 1 else 1))
        world.step(work)
    for i, length in enumerate(lengths):
        assert [token.id for token in world.tokens[i]] == alone[i, length]
    assert sorted(world.free) == list(range(32))


def test_prompt_logprobs_whole_and_in_chunks(model: Model) -> None:
    prompt = prompt_of(70, 5)
    expected = torch.log_softmax(all_logits(model, prompt).double(), 1)
    for chunk in (1 << 30, 9, 35):
        asked = greedy(1, prompt, 2, prompt_logprobs=3, logprobs=0)
        first, second = MiniScheduler(model).run([asked, greedy(2, prompt_of(30), 3)], chunk)[1]
        assert first.prompt_logprobs is not None
        assert len(first.prompt_logprobs) == 70
        assert first.prompt_logprobs[0] is None
        for i, entry in enumerate(first.prompt_logprobs[1:], 1):
            assert isinstance(entry, Logprobs)
            assert entry.token == pytest.approx(float(expected[i - 1, prompt[i]]), abs=1e-4)
            assert [token for token, _ in entry.top] == expected[i - 1].topk(3).indices.tolist()
        assert second.prompt_logprobs is None
        assert second.logprobs is not None
        assert second.logprobs.rank == 1


def test_a_prompt_of_one_token_has_one_empty_prompt_logprob(model: Model) -> None:
    tokens = MiniScheduler(model).run([greedy(1, [5], 1, prompt_logprobs=1)])[1]
    assert tokens[0].prompt_logprobs == (None,)


def test_the_context_ends_a_request(model: Model) -> None:
    world = MiniScheduler(model, max_model_len=40)
    tokens = world.run([greedy(1, prompt_of(33), 100)])[1]
    assert len(tokens) == 7
    assert tokens[-1].finish is FinishReason.LENGTH
    assert all(token.finish is None for token in tokens[:-1])


def test_end_of_sequence_ends_a_request(model: Model) -> None:
    biased = SamplingParams(max_tokens=50, temperature=0, min_tokens=3, logit_bias=((1, 100.0),))
    tokens = MiniScheduler(model).run([Request(1, prompt_of(5), biased)])[1]
    assert [token.finish for token in tokens] == [None, None, None, FinishReason.STOP]
    assert tokens[-1].id == 1


def test_a_model_that_computes_garbage_fails_its_requests_and_says_so(folder: Path) -> None:
    broken = load_model(folder)
    with torch.inference_mode():
        broken.get_parameter("norm.weight").fill_(float("nan"))
    world = MiniScheduler(broken)
    tokens = world.run([greedy(1, prompt_of(5), 3), greedy(2, prompt_of(9), 3)])
    assert tokens == {1: [], 2: []}
    assert set(world.failures) == {1, 2}
    assert "not finite" in world.failures[1]
    assert len(world.free) == 64


def test_garbage_in_unowned_blocks_does_not_matter(model: Model) -> None:
    clean = MiniScheduler(model)
    expected = clean.run([greedy(1, prompt_of(20), 10)])[1]
    dirty = MiniScheduler(model)
    dirty.kv.pool.fill_(float("nan"))
    assert dirty.run([greedy(1, prompt_of(20), 10)])[1] == expected


def test_warm_up_fits_the_smallest_pool(model: Model) -> None:
    MiniScheduler(model, num_blocks=1).runner.warm_up()


def test_kv_lands_where_the_layout_says(model: Model) -> None:
    """`[block][layer][k|v][head][token][dim]`, byte by byte as another process would read it."""
    world = MiniScheduler(model, block_size=16, num_blocks=8)
    world.add(greedy(1, prompt_of(20), 1))
    world.step([(1, 20)])
    layout, order = world.kv.layout, torch.randperm(8, generator=torch.Generator().manual_seed(1)).tolist()
    first, second = order[-1], order[-2]
    raw = torch.frombuffer(world.kv.buffer, dtype=torch.float32)
    rows = raw.view(8, layout.num_layers, 2, layout.num_kv_heads, 16, layout.head_dim)
    assert rows[first].ne(0).any(-1).all()
    assert rows[second, ..., :4, :].ne(0).any(-1).all()
    assert not rows[second, ..., 4:, :].any()
    assert not rows[[block for block in range(8) if block not in (first, second)]].any()
