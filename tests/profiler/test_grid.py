"""Which steps are timed: never more than the instance can hold, and closer where the curve bends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distserve.profiler import grid
from distserve.profiler.grid import Range
from distserve.profiler.phases import STEPS

ranges = st.builds(
    Range,
    longest_prompt=st.integers(64, 8192),
    longest_context=st.integers(64, 8192),
    kv_tokens=st.integers(256, 200_000),
    largest_batch=st.integers(1, 300),
    block_size=st.sampled_from([16, 32, 64]),
)


@given(ranges, st.sampled_from([32, 256, 2048]))
def test_every_point_fits_and_both_ends_are_there(within: Range, knee: int) -> None:
    prompts, decodes = grid.prompts(within, knee), grid.decodes(within)
    blocks = within.kv_tokens // within.block_size

    def held(tokens: int) -> int:
        return -(-tokens // within.block_size)

    for lengths in prompts:
        assert grid.SHORTEST // 2 <= max(lengths) <= within.longest_prompt
        assert sum(map(held, lengths)) <= blocks
        assert len(lengths) == 1 or sum(lengths) <= 2 * knee
    assert (min(within.longest_prompt, within.room(1)),) in prompts
    for batch, context in decodes:
        assert 1 <= batch <= within.largest_batch
        assert grid.SHORTEST <= context <= within.longest_context
        assert batch * held(context + 2 * STEPS) <= blocks
    assert len(set(prompts)) == len(prompts)
    assert len(set(decodes)) == len(decodes)
    for computed, new, batch, context in grid.mixed(within, knee):
        assert computed + new <= within.longest_prompt
        assert held(computed + new) + batch * held(context) <= blocks
        assert new >= 1


def test_the_neighbours_of_the_worst_point_are_next() -> None:
    alone = {(16,): 0.01, (256,): 0.2, (1024,): 0.02, (512, 512): 0.1}
    assert grid.closer_prompts(alone) == [(64,), (512,)]
    cells = {(1, 64): 0.0, (1, 1024): 0.0, (16, 64): 0.1, (16, 1024): 0.3, (64, 128): 0.0}
    found = grid.closer_decodes(cells)
    assert (16, 256) in found
    assert (4, 1024) in found
    assert (32, 128) in found  # no further than the larger batch was timed


def test_there_is_an_end_to_looking_closer() -> None:
    assert grid.closer_prompts({(16,): 0.5, (20,): 0.1}) == []
    assert grid.closer_decodes({(1, 64): 0.5, (2, 64): 0.1}) == []
