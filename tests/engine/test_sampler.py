"""The sampler against slow and obvious references: exact probabilities, naive penalties, torch's log_softmax."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distserve.engine.sampler import draw, prompt_logprobs, sample, uniform
from distserve.engine.state import RequestState
from distserve.errors import RequestError
from distserve.request import FinishReason, Request, SamplingParams, Token

VOCAB = 50
EOS = (2,)


def state(
    prompt: Sequence[int] = (5, 6, 7), output: Sequence[int] = (), vocab: int = VOCAB, **sampling: Any
) -> RequestState:
    params = SamplingParams(**{"max_tokens": 100, **sampling})
    return RequestState(Request(1, list(prompt), params, output=list(output)), VOCAB, EOS)


def logits(seed: int = 0, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def one(row: torch.Tensor, who: RequestState, max_model_len: int = 10_000) -> Token:
    token = sample(row, [who], max_model_len)[0]
    assert token is not None
    return token


def kept_probabilities(row: np.ndarray[Any, Any], params: SamplingParams) -> dict[int, float]:
    """temperature, min_p, top_k, top_p one after the other, in double precision, over a plain sorted list."""
    scaled = row.astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled.max())
    order = sorted(range(len(row)), key=lambda i: (-weights[i], i))
    order = [i for i in order if weights[i] >= params.min_p]
    if params.top_k > 0:
        order = order[: params.top_k]
    total, mass, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if mass >= params.top_p * total:
            break
        kept.append(i)
        mass += weights[i]
    return {i: weights[i] / mass for i in kept}


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.8},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"top_k": 1},
    {"top_p": 1e-9},
    {"top_k": -1, "min_p": 1.0},
]


@pytest.mark.parametrize("filters", FILTERS)
def test_draws_follow_the_exact_distribution(filters: dict[str, Any]) -> None:
    """Chi-square over 4,000 draws with fixed seeds; what is filtered out never appears."""
    row = logits()[0].numpy()
    params = SamplingParams(seed=3, **filters)
    expected = kept_probabilities(row, params)
    count = 4000
    drawn = Counter(draw(row, params, uniform(params.seed, i)) for i in range(count))
    assert set(drawn) <= set(expected)
    likely = {i: p for i, p in expected.items() if p * count >= 5}
    rest = count - sum(drawn[i] for i in likely)
    statistic = sum((drawn[i] - p * count) ** 2 / (p * count) for i, p in likely.items())
    left = (1 - sum(likely.values())) * count
    statistic += (rest - left) ** 2 / left if left > 1 else 0
    freedom = max(1, len(likely) - 1)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom), (statistic, freedom)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.01, 0.5, 3.0, 20.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 4000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 1e-4, 1e-9]),
    number=st.floats(0, 1, exclude_max=True),
)
def test_a_draw_equals_that_over_the_whole_sorted_vocabulary(
    seed: int, scale: float, temperature: float, top_k: int, top_p: float, min_p: float, number: float
) -> None:
    """Looking only at the likeliest candidates first changes nothing (but for rounding at a border)."""
    row = torch.randn(5000, generator=torch.Generator().manual_seed(seed)).numpy() * np.float32(scale)
    row[seed % 5000] = row[0]  # a tie
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = kept_probabilities(row, params)
    ids, cumulative = list(expected), np.cumsum(list(expected.values()))
    place = ids.index(draw(row, params, number)) if draw(row, params, number) in expected else len(ids) - 1
    low = cumulative[place - 1] if place else 0.0
    assert low - 1e-5 <= number <= cumulative[place] + 1e-5


def test_the_uniform_number_depends_on_seed_and_index_alone() -> None:
    numbers = [uniform(seed, index) for seed in range(40) for index in range(50)]
    assert len(set(numbers)) == 2000
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / 2000 - 0.5) < 0.03
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)


def test_results_do_not_depend_on_the_rest_of_the_batch() -> None:
    rows = logits(rows=8)
    params: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 1},
        {"seed": 1, "top_p": 0.9},
        {"temperature": 0, "frequency_penalty": 1.5},
        {"seed": 9, "logprobs": 3},
        {"temperature": 0, "logit_bias": ((3, 50.0),)},
        {"seed": 4, "repetition_penalty": 1.3, "min_p": 0.05},
        {"temperature": 0, "min_tokens": 4},
    ]
    together = sample(rows, [state(output=(8, 8, 9), **p) for p in params], 1000)
    alone = [one(rows[i : i + 1], state(output=(8, 8, 9), **p)) for i, p in enumerate(params)]
    assert together == alone
    assert together[5] is not None
    assert together[5].id == 3


def test_greedy_takes_the_first_of_equals() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, [30, 11, 40]] = 5.0
    assert one(row, state(temperature=0)).id == 11
    assert one(row, state(temperature=0, presence_penalty=0.1)).id == 11


def test_penalties_equal_the_naive_ones() -> None:
    prompt, output = [5, 6, 7, 7], [8, 9, 8, 8, 5]
    row = logits(4)
    for presence, frequency, repetition in ((1.5, 0, 1.0), (0, 0.7, 1.0), (0, 0, 1.8), (-1.0, 0.5, 0.6)):
        expected = row[0].clone()
        for token in set(prompt) | set(output):
            expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
        for token in set(output):
            expected[token] -= presence + frequency * output.count(token)
        probabilities = torch.softmax(expected, 0)
        sampling: dict[str, Any] = {
            "presence_penalty": presence,
            "frequency_penalty": frequency,
            "repetition_penalty": repetition,
        }
        assert one(row, state(prompt, output, temperature=0, **sampling)).id == int(expected.argmax())
        order = sorted(range(VOCAB), key=lambda i: (-probabilities[i], i))
        cumulative = torch.cumsum(probabilities[order].double(), 0)
        place = int((cumulative <= uniform(11, len(output))).sum())
        assert one(row, state(prompt, output, seed=11, **sampling)).id == order[place]


def test_logit_bias_moves_and_bans() -> None:
    row = logits(5)
    best = int(row.argmax())
    banned = one(row, state(temperature=0, logit_bias=((best, -100.0),))).id
    assert banned == int(row[0].topk(2).indices[1])
    assert one(row, state(temperature=0.0, logit_bias=((17, 100.0),))).id == 17


def test_min_tokens_makes_stopping_impossible_until_then() -> None:
    row = torch.full((1, VOCAB), -5.0)
    row[0, 2], row[0, 33], row[0, 4] = 9.0, 8.0, 7.0
    who = state(temperature=0, min_tokens=2, stop_token_ids=(33,))
    assert [one(row, who).id for _ in range(3)] == [4, 4, 2]
    only_eos = state(temperature=0, min_tokens=2, ignore_eos=True)
    assert one(row, only_eos).id == 2  # it is an ordinary token then


def test_what_ends_a_request() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 2] = 9.0
    assert one(row, state(temperature=0)).finish is FinishReason.STOP
    assert one(row, state(temperature=0, ignore_eos=True)).finish is None
    assert one(row, state(temperature=0, ignore_eos=True, stop_token_ids=(2,))).finish is FinishReason.STOP
    row[0, 30] = 10.0
    assert one(row, state(temperature=0, stop_token_ids=(30,))).finish is FinishReason.STOP
    assert one(row, state(temperature=0)).finish is None
    assert one(row, state(temperature=0, max_tokens=1)).finish is FinishReason.LENGTH
    assert one(row, state(temperature=0, max_tokens=3, output=(4, 4))).finish is FinishReason.LENGTH
    assert one(row, state(temperature=0), max_model_len=4).finish is FinishReason.LENGTH
    assert one(row, state(temperature=0), max_model_len=5).finish is None


def test_a_row_that_is_not_finite_fails_alone() -> None:
    rows = logits(rows=4)
    rows[1, 7], rows[2, 9] = float("nan"), float("inf")
    states = [state(temperature=0), state(temperature=0), state(seed=1), state(seed=2)]
    tokens = sample(rows, states, 100)
    assert [token is None for token in tokens] == [False, True, True, False]
    assert [len(who.request.output) for who in states] == [1, 0, 0, 1]
    assert sample(torch.full((1, VOCAB), float("-inf")), [state()], 100) == [None]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_client_that_leaves_no_token_fails_alone(temperature: float) -> None:
    """Every token is a stop token and none may come yet; a bias without bounds."""
    nothing: list[dict[str, Any]] = [
        {"stop_token_ids": tuple(range(VOCAB)), "min_tokens": 1},
        {"logit_bias": ((3, float("inf")),)},
        {"logit_bias": ((3, float("nan")),)},
    ]
    states = [state(temperature=temperature, **asked) for asked in nothing]
    tokens = sample(logits(rows=4), [*states, state(temperature=temperature)], 100)
    assert [token is None for token in tokens] == [True, True, True, False]


@pytest.mark.parametrize("wanted", [0, 1, 5, 20])
def test_logprobs_are_those_of_the_raw_logits(wanted: int) -> None:
    row = logits(6)
    token = one(row, state(seed=3, temperature=0.5, logprobs=wanted, logit_bias=((9, 4.0),), presence_penalty=1))
    expected = torch.log_softmax(row[0].double(), 0)
    assert token.logprobs is not None
    assert token.logprobs.token == pytest.approx(float(expected[token.id]), abs=1e-5)
    assert token.logprobs.rank == 1 + int((row[0] > row[0, token.id]).sum())
    values, ids = expected.topk(max(wanted, 1))
    assert [i for i, _ in token.logprobs.top] == ids.tolist()[:wanted]
    assert [p for _, p in token.logprobs.top] == pytest.approx(values.tolist()[:wanted], abs=1e-5)


def test_logprobs_of_equals_come_in_order_of_id() -> None:
    row = torch.zeros(1, VOCAB)
    token = one(row, state(temperature=0, logprobs=4))
    assert token.logprobs is not None
    assert [i for i, _ in token.logprobs.top] == [0, 1, 2, 3]


def test_prompt_logprobs_go_out_with_the_first_token() -> None:
    rows = logits(7, rows=2)
    who = state(prompt=(5, 6, 7), temperature=0, prompt_logprobs=2)
    assert who.prompt_logprobs is not None
    who.prompt_logprobs[1:3] = prompt_logprobs(rows, [6, 7], 2)
    first, second = one(rows[:1], who), one(rows[:1], who)
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    for entry, row, token in zip(first.prompt_logprobs[1:], rows, (6, 7), strict=True):
        assert entry is not None
        assert entry.token == pytest.approx(float(torch.log_softmax(row, 0)[token]), abs=1e-5)
    assert second.prompt_logprobs is None


@pytest.mark.parametrize(
    "wrong", [{"prompt": (1, VOCAB)}, {"prompt": (-1,)}, {"stop_token_ids": (VOCAB,)}, {"logit_bias": ((-2, 1.0),)}]
)
def test_unknown_tokens_are_the_clients_mistake(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="names token") as caught:
        state(**wrong)
    assert caught.value.param == next(iter(wrong))


def test_a_retry_draws_what_the_first_attempt_drew() -> None:
    rows = logits(8, rows=30)
    whole = state(seed=5, frequency_penalty=0.5, repetition_penalty=1.2)
    tokens = [one(rows[i : i + 1], whole).id for i in range(30)]
    retry = state(output=tokens[:13], seed=5, frequency_penalty=0.5, repetition_penalty=1.2)
    assert [one(rows[i : i + 1], retry).id for i in range(13, 30)] == tokens[13:]
    other = replace(whole.request, output=[])
    assert other.sampling.seed == 5
