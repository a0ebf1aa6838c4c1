"""A batch as lists: which tokens, which rows, whose prompt is scored; and it survives the wire."""

from __future__ import annotations

import msgspec

from distserve.engine.state import RequestState
from distserve.engine.step import StepInput, plan_step
from distserve.request import Request, SamplingParams
from distserve.sched.base import Batch, Sequence


def state(request_id: int, prompt: list[int], prompt_logprobs: int | None = None) -> RequestState:
    return RequestState(Request(request_id, prompt, SamplingParams(prompt_logprobs=prompt_logprobs)), 100, (1,))


def test_prompts_in_chunks_beside_one_that_decodes() -> None:
    states = {1: state(1, [5, 6, 7, 8, 9], prompt_logprobs=0), 2: state(2, [10, 11]), 3: state(3, [12, 13, 14])}
    states[2].append(20)
    batch = Batch(
        0,
        [
            (Sequence(1, 5, num_computed=1, blocks=[3, 4]), 4),
            (Sequence(2, 3, num_computed=2, blocks=[7]), 1),
            (Sequence(3, 3, blocks=[9]), 2),
        ],
    )
    step = plan_step(batch, states)
    assert step == StepInput(
        ids=[6, 7, 8, 9, 20, 12, 13],
        query_lens=[4, 1, 2],
        context_lens=[5, 3, 2],
        block_tables=[[3, 4], [7], [9]],
        rows=[3, 4, 0, 1, 2],
        sampled=[1, 2],
        scored=[(1, 2, 3)],
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(step), type=StepInput) == step


def test_a_prompt_is_not_scored_again_after_its_first_token() -> None:
    """It was preempted and is computed once more."""
    states = {1: state(1, [5, 6, 7], prompt_logprobs=0)}
    states[1].append(8)
    assert plan_step(Batch(0, [(Sequence(1, 4, blocks=[0]), 4)]), states).scored == []
