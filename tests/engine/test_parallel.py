"""Ranks compute together what one device computes: every family, tp and pp in {1, 2, 3}, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.oracle import distance
from tests.engine.ranks import BLOCK_SIZE, Ranks
from tests.engine.support import greedy, reference_tokens
from tests.engine.test_models import CASES, checkpoint

from distserve.engine import kernels
from distserve.engine.parallel import check_degrees, sharding_of
from distserve.engine.state import RequestState
from distserve.engine.step import StepInput, plan_step
from distserve.errors import PlanError
from distserve.sched.base import Batch, Sequence
from distserve.specs import ModelSpec

# Widths that 2 and 3 ranks can share; the vocabulary of 128 they cannot share evenly.
WIDE = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6}
FEW = {**WIDE, "num_key_value_heads": 1}  # every rank holds the only KV head
OLD = {"hidden_size": 96, "num_attention_heads": 6}
SHAPES: dict[str, dict[str, Any]] = {
    "mha": WIDE,
    "biases": {**FEW, "tie_word_embeddings": True},
    "mistral window": WIDE,
    "qwen2": FEW,
    "qwen3": WIDE,
    "qwen3 tied, sharded": FEW,
    "opt": OLD,
    "opt 350m": OLD,
    "gpt2": {"n_embd": 96, "n_head": 6},
    "gpt2 untied, sharded": {"n_embd": 96, "n_head": 6},
}
DEGREES = [(tp, pp) for tp in (1, 2, 3) for pp in (1, 2, 3)]
STEPS = 200
assert SHAPES.keys() <= CASES.keys()


def generate(ranks: Ranks, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedily, the prompt in one step, then token by token."""
    state = RequestState(greedy(1, prompt, max_tokens), ranks.spec.vocab_size, ())
    blocks = list(range(-(-(len(prompt) + max_tokens) // BLOCK_SIZE)))[::-1]
    computed = 0
    while len(state.request.output) < max_tokens:
        ids = state.tokens[computed:]
        computed += len(ids)
        ranks.run(StepInput(ids, [len(ids)], [computed], [blocks], [len(ids) - 1], [1], []), {1: state})
    return state.request.output


@pytest.mark.parametrize("case", SHAPES)
def test_every_way_to_share_gives_the_logits_of_transformers(case: str, tmp_path: Path) -> None:
    """Of a prompt and of the 200 tokens that transformers goes on with; so all would go on with the same."""
    reference = checkpoint(tmp_path, case, **SHAPES[case])
    prompt = torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    tokens = reference_tokens(reference, prompt, STEPS)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt + tokens])).logits[0]
    for tp, pp in DEGREES:
        with Ranks.all(tmp_path, tp, pp) as ranks:
            got = torch.cat([ranks.logits((prompt + tokens)[:100]), ranks.logits((prompt + tokens)[100:], 100)])
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert got[len(prompt) - 1 : -1].argmax(1).tolist() == tokens


@pytest.mark.parametrize(("case", "degrees"), list(zip(SHAPES, [(3, 2), (2, 3)] * 5, strict=True)))
def test_greedy_tokens_equal_those_of_transformers(case: str, degrees: tuple[int, int], tmp_path: Path) -> None:
    """Token by token, over 200 steps."""
    reference = checkpoint(tmp_path, case, **SHAPES[case])
    prompt = torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    with Ranks.all(tmp_path, *degrees) as ranks:
        assert generate(ranks, prompt, STEPS) == reference_tokens(reference, prompt, STEPS)


@pytest.mark.parametrize(("num_kv_heads", "tp"), [(3, 3), (3, 6), (2, 2), (2, 6), (6, 6)])
def test_grouped_heads(num_kv_heads: int, tp: int, tmp_path: Path) -> None:
    """Whether ranks share KV heads or several hold the same."""
    reference = checkpoint(tmp_path, "gqa", **{**WIDE, "num_key_value_heads": num_kv_heads})
    prompt = list(range(3, 80))
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    with Ranks.all(tmp_path, tp, 2) as ranks:
        torch.testing.assert_close(ranks.logits(prompt), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["mha", "qwen3", "opt", "opt 350m", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Stages change no bit. Ranks of a stage change the order of fp32 sums: the answer is as near to one in full
    precision as one device's."""
    reference = checkpoint(tmp_path, case, **SHAPES[case])
    prompt = list(range(3, 80))
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    found = {}
    for tp, pp in [(1, 1), (1, 3), (3, 1), (2, 2)]:
        with Ranks.all(tmp_path, tp, pp, dtype) as ranks:
            found[tp, pp] = ranks.logits(prompt)
    assert torch.equal(found[1, 3], found[1, 1])
    off = distance(found[1, 1], expected)
    for degrees in [(3, 1), (2, 2)]:
        assert distance(found[degrees], expected) < 1.2 * off, degrees


@pytest.mark.parametrize("case", ["mha", "qwen3", "gpt2"])
def test_a_sequence_does_not_notice_how_it_was_cut(case: str, tmp_path: Path) -> None:
    """To the last bit, where our own kernels multiply: also where ranks sum."""
    library = kernels.load()
    if library is None or not library.packs:
        pytest.skip("this processor has no bf16 vectors: a library multiplies, which promises no equal bits")
    checkpoint(tmp_path, case, **SHAPES[case])
    prompt = list(range(3, 103))
    with Ranks.all(tmp_path, 3, 2, torch.bfloat16) as ranks:
        whole = ranks.logits(prompt)
        parts = [ranks.logits(prompt[first:last], first) for first, last in [(0, 31), (31, 32), (32, 99), (99, 100)]]
    assert torch.equal(torch.cat(parts), whole)


def test_prompt_log_probabilities(tmp_path: Path) -> None:
    """Scored in the last stage, by all of its ranks together, where only one knows the request."""
    checkpoint(tmp_path, "mha", **WIDE)
    found = []
    for degrees in [(1, 1), (3, 2)]:
        request = greedy(1, list(range(3, 80)), 1, prompt_logprobs=2)
        with Ranks.all(tmp_path, *degrees) as ranks:
            states = {1: RequestState(request, 128, ())}
            step = plan_step(Batch(0, [(Sequence(1, 77, blocks=list(range(5))), 77)]), states)
            found.append(ranks.run(step, states).tokens[1].prompt_logprobs)
    assert found[0] is not None
    assert found[1] is not None
    assert [of and [id for id, _ in of.top] for of in found[1]] == [of and [id for id, _ in of.top] for of in found[0]]
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert one is not None
        assert other is not None
        assert other.token == pytest.approx(one.token, abs=1e-4)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 31), (0, 1), (1, 0), (27, 1)])
def test_degrees_that_do_not_fit_are_refused_with_those_that_do(tp: int, pp: int) -> None:
    spec = ModelSpec("llama", 30, 9, 3, 64, 576, 1536, 49152, 8192)
    with pytest.raises(PlanError, match=r"9 heads over 3 KV heads.*tp = 1 or 3 and pp = 1 to 30$") as caught:
        check_degrees(spec, tp, pp)
    assert "\n" not in str(caught.value)
    assert sharding_of(spec, 3, 7).stages == (5, 5, 4, 4, 4, 4, 4)


def test_every_parameter_is_held_by_somebody_and_no_more_often_than_needed(tmp_path: Path) -> None:
    """A tied table is held by the first and the last stage."""
    checkpoint(tmp_path, "biases", **SHAPES["biases"])
    with Ranks.all(tmp_path, 1, 1) as one, Ranks.all(tmp_path, 3, 3) as nine:
        whole, table = sum(p.numel() for p in one.models[0].parameters()), 128 * 96
        shares = [sum(p.numel() for p in model.parameters()) for model in nine.models]
    assert whole + table <= sum(shares) < 1.2 * whole + table
    assert max(shares) < 0.25 * whole
