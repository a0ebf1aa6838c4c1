"""Micro-batches that keep their members and take turns (DistServe's own engine), and which scheduler a role is."""

from __future__ import annotations

import pytest
from tests.sched.support import ids

from distserve.sched.base import Batch, Sequence
from distserve.sched.blocks import BlockCount, BlockPool
from distserve.sched.colocated import ChunkedScheduler, PrefillFirstScheduler
from distserve.sched.decode import DecodeScheduler
from distserve.sched.policy import DecodePolicy
from distserve.sched.prefill import PrefillScheduler
from distserve.sched.roles import Policies, scheduler_for
from distserve.sched.turns import TurnsScheduler


def turns(num_blocks: int = 64, stages: int = 2) -> TurnsScheduler:
    policy = DecodePolicy(watermark_blocks=0, micro_batches="joined")
    return TurnsScheduler(BlockPool(num_blocks, 16), policy, max_in_flight=stages)


def comes(scheduler: DecodeScheduler, *sequence_ids: int, num_prompt: int = 20) -> None:
    """Hand-offs arrive and are pulled at once."""
    for i in sequence_ids:
        scheduler.add(Sequence(i, num_prompt + 1, num_kv_tokens=num_prompt), 0.0)
    for sequence in scheduler.next_pulls(0.0):
        scheduler.pulled(sequence.id, 0.0)


def launch(scheduler: DecodeScheduler) -> Batch:
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    return batch


def members(batch: Batch) -> list[int]:
    return [sequence.id for sequence, _ in batch.items]


def test_who_comes_together_stays_together() -> None:
    scheduler = turns()
    comes(scheduler, 1, 2)
    first = launch(scheduler)
    assert members(first) == [1, 2]
    assert scheduler.next_batch(0.0) is None  # the other micro-batch is empty and passes its turn
    comes(scheduler, 3)
    assert scheduler.next_batch(0.0) is None  # it has passed: 3 comes too late for it
    scheduler.complete(first, (), 0.0)
    first = launch(scheduler)
    assert members(first) == [1, 2, 3]  # and joins the one whose turn it is: the large one grows


def test_two_micro_batches_alternate() -> None:
    scheduler = turns()
    comes(scheduler, 1)
    first = launch(scheduler)
    comes(scheduler, 2)
    second = launch(scheduler)
    assert members(second) == [2]
    for _ in range(3):
        scheduler.complete(first, (), 0.0)
        first = launch(scheduler)
        assert members(first) == [1]
        scheduler.complete(second, (), 0.0)
        second = launch(scheduler)
        assert members(second) == [2]
    scheduler.complete(first, [1], 0.0)
    assert scheduler.next_batch(0.0) is None
    outcome = scheduler.complete(second, [2], 0.0)
    assert ids(outcome.finished) == [2]
    assert scheduler.next_batch(0.0) is None
    assert scheduler.pool.num_free == 64


def test_a_turn_after_nothing_is_anybodys() -> None:
    scheduler = turns(stages=3)
    assert scheduler.next_batch(0.0) is None
    comes(scheduler, 1)
    assert members(launch(scheduler)) == [1]


def test_a_role_is_a_scheduler() -> None:
    pool, policies = BlockPool(64, 16), Policies()
    assert isinstance(scheduler_for("prefill", pool, policies), PrefillScheduler)
    assert type(scheduler_for("decode", pool, policies)) is DecodeScheduler
    assert isinstance(scheduler_for("colocated", pool, policies), ChunkedScheduler)
    assert isinstance(scheduler_for("colocated", pool, policies, policy="prefill-first"), PrefillFirstScheduler)
    joined = Policies(decode=DecodePolicy(micro_batches="joined"))
    assert type(scheduler_for("decode", pool, joined)) is DecodeScheduler  # one batch has no turns
    assert isinstance(scheduler_for("decode", pool, joined, max_in_flight=2), TurnsScheduler)
    prefill = scheduler_for("prefill", pool, policies, batch_tokens=77)
    assert isinstance(prefill, PrefillScheduler)
    assert prefill.policy.max_batch_tokens == 77


def test_blocks_that_are_only_counted() -> None:
    pool = BlockCount(10, 16)
    mine = pool.allocate(4)
    assert (len(mine), pool.num_free) == (4, 6)
    pool.free(mine)
    assert (mine, pool.num_free) == ([], 10)
    with pytest.raises(AssertionError, match="11 blocks wanted"):
        pool.allocate(11)
    with pytest.raises(AssertionError, match="more blocks are freed"):
        pool.free([0])
