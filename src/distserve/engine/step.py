"""A batch as plain lists: all that a rank must be told to compute it. Knows no tensor, so that a process that computes
nothing can write it, and nothing of how ranks share the work: every rank of an instance is told the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distserve.engine.state import RequestState
from distserve.sched.base import Batch


@dataclass(frozen=True, slots=True)
class StepInput:
    """One pass of the model over the tokens of several sequences, which lie one after the other."""

    ids: list[int]  # tokens to compute
    query_lens: list[int]  # of each sequence: how many of them
    context_lens: list[int]  # of each sequence: tokens in the cache after this step
    block_tables: list[list[int]]  # of each sequence: the blocks that hold them
    rows: list[int]  # tokens (indices into `ids`) whose hidden states are needed: of `sampled`, then of `scored`
    sampled: list[int]  # requests that are computed to their end: each gets a token
    scored: list[tuple[int, int, int]]  # prompt log-probabilities: (request, number of its first token, how many)


def plan_step(batch: Batch, states: Mapping[int, RequestState]) -> StepInput:
    """What computing `batch` takes. A prompt's log-probabilities come from the hidden states before its tokens."""
    step = StepInput([], [], [], [], [], [], [])
    scored_rows: list[int] = []
    for sequence, count in batch.items:
        state, first = states[sequence.id], sequence.num_computed
        last = first + count
        if state.scores_prompt:
            number = min(last, len(state.request.prompt) - 1) - first
            step.scored.append((sequence.id, first + 1, number))
            scored_rows += range(len(step.ids), len(step.ids) + number)
        step.ids.extend(state.tokens[first:last])
        step.query_lens.append(count)
        step.context_lens.append(last)
        step.block_tables.append(sequence.blocks)
        if last == len(state.tokens):
            step.sampled.append(sequence.id)
            step.rows.append(len(step.ids) - 1)
    step.rows.extend(scored_rows)
    return step
