from collections.abc import Callable
from typing import Any

import pytest
from tests.sched.support import ids, run_step, shape

from distserve.errors import RequestError
from distserve.sched.base import Outcome, PullingScheduler, Sequence, State
from distserve.sched.blocks import BlockPool
from distserve.sched.decode import DecodeScheduler
from distserve.sched.policy import DecodePolicy


def scheduler(num_blocks: int = 64, max_in_flight: int = 1, **policy: Any) -> DecodeScheduler:
    policy.setdefault("watermark_blocks", 0)
    return DecodeScheduler(BlockPool(num_blocks, 16), DecodePolicy(**policy), max_in_flight=max_in_flight)


def hand_off(id: int, num_prompt: int) -> Sequence:
    """Prefilled elsewhere: the KV of the prompt waits there, the first token is known."""
    return Sequence(id, num_tokens=num_prompt + 1, num_kv_tokens=num_prompt)


def decoding(target: DecodeScheduler, *prompts: int, first: int = 0) -> list[Sequence]:
    """Hand-offs that have been pulled."""
    sequences = [hand_off(first + i, n) for i, n in enumerate(prompts)]
    for sequence in sequences:
        target.add(sequence, 0.0)
        assert target.next_pulls(0.0) == [sequence]
        target.pulled(sequence.id, 0.0)
    return sequences


def test_keeps_the_contract() -> None:
    pulling: PullingScheduler = scheduler()
    assert pulling.next_batch(0.0) is None


class TestPulls:
    def test_a_hand_off_is_pulled_into_exactly_the_blocks_of_its_kv(self) -> None:
        decode = scheduler()
        sequence = hand_off(0, 32)
        decode.add(sequence, 0.0)
        assert sequence.state is State.WAITING
        assert decode.next_batch(0.0) is None
        assert decode.next_pulls(0.0) == [sequence]
        assert (sequence.state, len(sequence.blocks)) == (State.PULLING, 2)
        assert decode.next_pulls(0.0) == []
        assert decode.next_batch(0.0) is None, "nothing is computed from KV that is not here"
        decode.pulled(0, 0.0)
        assert (sequence.state, sequence.num_computed) == (State.RUNNING, 32)
        assert shape(decode.next_batch(0.0)) == [(0, 1)]
        assert len(sequence.blocks) == 3

    def test_first_come_first_served_and_nobody_passes(self) -> None:
        decode = scheduler(num_blocks=8)
        decoding(decode, 60)
        for id, num_prompt in ((1, 70), (2, 10), (3, 10)):
            decode.add(hand_off(id, num_prompt), 0.0)
        assert decode.next_pulls(0.0) == [], "5 of 4 free blocks; the short ones wait behind"
        run_step(decode, ended={0})
        assert ids(decode.next_pulls(0.0)) == [1, 2, 3]

    def test_a_burst_waits_instead_of_failing(self) -> None:
        decode = scheduler(num_blocks=8)
        for id in range(40):
            decode.add(hand_off(id, 31), 0.0)
        served: list[int] = []
        while len(served) < 40:
            for sequence in decode.next_pulls(0.0):
                decode.pulled(sequence.id, 0.0)
            batch = decode.next_batch(0.0)
            assert batch is not None
            assert len(batch.items) <= 4
            served += ids(decode.complete(batch, {s.id for s, _ in batch.items}, 0.0).finished)
        assert served == list(range(40))
        assert decode.load().num_preemptions == 0

    def test_the_next_token_needs_room_too(self) -> None:
        decode = scheduler(num_blocks=4)
        decoding(decode, 20)
        decode.add(hand_off(1, 32), 0.0)
        assert decode.next_pulls(0.0) == [], "its 2 blocks are free, but not the third for its next token"

    def test_the_watermark_stays_free(self) -> None:
        decode = scheduler(num_blocks=8, watermark_blocks=3)
        decoding(decode, 20, 20)
        decode.add(hand_off(2, 20), 0.0)
        assert decode.next_pulls(0.0) == []

    def test_the_watermark_is_no_obstacle_for_the_only_one(self) -> None:
        decode = scheduler(num_blocks=8, watermark_blocks=8)
        decode.add(hand_off(0, 100), 0.0)
        assert ids(decode.next_pulls(0.0)) == [0]

    def test_batch_size_limits_what_is_admitted(self) -> None:
        decode = scheduler(max_batch_size=2)
        for id in range(3):
            decode.add(hand_off(id, 5), 0.0)
        assert ids(decode.next_pulls(0.0)) == [0, 1]
        decode.pulled(0, 0.0)
        assert decode.next_pulls(0.0) == []
        run_step(decode, ended={0})
        assert ids(decode.next_pulls(0.0)) == [2]

    def test_a_failed_pull_frees_and_forgets(self) -> None:
        decode = scheduler()
        sequence = hand_off(0, 20)
        decode.add(sequence, 0.0)
        decode.next_pulls(0.0)
        assert decode.pull_failed(0, 0.0).dropped == [sequence]
        assert (sequence.state, decode.pool.num_free, 0 in decode) == (State.ABORTED, 64, False)
        assert decode.pull_failed(0, 0.0).dropped == []
        assert decode.pulled(0, 0.0).dropped == [], "late word of a pull that has failed"

    def test_pulled_twice_changes_nothing(self) -> None:
        decode = scheduler()
        decoding(decode, 20)
        decode.pulled(0, 0.0)
        assert shape(decode.next_batch(0.0)) == [(0, 1)]

    def test_order_of_service_is_order_of_arrival_whatever_order_pulls_end_in(self) -> None:
        decode = scheduler()
        for id in range(3):
            decode.add(hand_off(id, 20), 0.0)
        decode.next_pulls(0.0)
        for id in (2, 0, 1):
            decode.pulled(id, 0.0)
        assert shape(decode.next_batch(0.0)) == [(0, 1), (1, 1), (2, 1)]


def test_continuous_batching_joins_and_leaves_at_any_step() -> None:
    decode = scheduler()
    decoding(decode, 20, 30)
    assert shape(run_step(decode)[0]) == [(0, 1), (1, 1)]
    decoding(decode, 40, first=2)
    batch, outcome = run_step(decode, ended={0})
    assert shape(batch) == [(0, 1), (1, 1), (2, 1)]
    assert (ids(outcome.sampled), ids(outcome.finished)) == ([0, 1, 2], [0])
    assert shape(run_step(decode)[0]) == [(1, 1), (2, 1)]


def test_grows_by_a_block_when_the_last_one_is_full() -> None:
    decode = scheduler()
    (sequence,) = decoding(decode, 14)
    lengths = []
    for _ in range(4):
        run_step(decode)
        lengths.append(len(sequence.blocks))
    assert lengths == [1, 1, 2, 2]


class TestRecomputation:
    def test_what_comes_without_kv_is_computed_in_chunks_beside_the_decodes(self) -> None:
        decode = scheduler(chunk_tokens=16)
        decoding(decode, 20)
        decode.add(Sequence(1, 40), 0.0)
        assert decode.next_pulls(0.0) == []
        steps = [run_step(decode) for _ in range(4)]
        assert [shape(batch) for batch, _ in steps] == [
            [(0, 1), (1, 16)],
            [(0, 1), (1, 16)],
            [(0, 1), (1, 8)],
            [(0, 1), (1, 1)],
        ]
        assert [ids(outcome.sampled) for _, outcome in steps] == [[0], [0], [0, 1], [0, 1]]

    def test_the_chunk_is_shared_in_order(self) -> None:
        decode = scheduler(chunk_tokens=16)
        for id, n in ((0, 20), (1, 5), (2, 30)):
            decode.add(Sequence(id, n), 0.0)
        assert shape(run_step(decode)[0]) == [(0, 16)]
        assert shape(run_step(decode)[0]) == [(0, 4), (1, 5), (2, 7)]

    def test_a_hand_off_behind_it_need_not_wait_for_the_chunk(self) -> None:
        decode = scheduler(chunk_tokens=16)
        decode.add(Sequence(0, 40), 0.0)
        decode.add(hand_off(1, 20), 0.0)
        assert ids(decode.next_pulls(0.0)) == [1]

    def test_kv_that_covers_only_part_of_the_tokens_is_completed_here(self) -> None:
        decode = scheduler(chunk_tokens=16)
        decode.add(Sequence(0, num_tokens=60, num_kv_tokens=20), 0.0)
        decode.next_pulls(0.0)
        decode.pulled(0, 0.0)
        assert [shape(run_step(decode)[0]) for _ in range(4)] == [[(0, 16)], [(0, 16)], [(0, 8)], [(0, 1)]]

    def test_what_could_never_fit_is_refused_with_the_cure(self) -> None:
        decode = scheduler(num_blocks=4)
        with pytest.raises(RequestError, match="shorten the prompt, or serve with more KV memory"):
            decode.add(hand_off(0, 64), 0.0)
        decode.add(hand_off(0, 63), 0.0)


class TestPreemption:
    def test_takes_from_the_last_come_who_keeps_its_place(self) -> None:
        decode = scheduler(num_blocks=6)
        first, _, last = decoding(decode, 31, 31, 31)
        decode.add(hand_off(3, 10), 0.0)
        assert decode.next_pulls(0.0) == []
        run_step(decode)  # all write into the last slot of their second block
        assert shape(decode.next_batch(0.0)) == [(0, 1), (1, 1)]
        assert (last.state, last.blocks, last.num_computed, last.num_tokens) == (State.PREEMPTED, [], 0, 33)
        assert len(first.blocks) == 3
        assert decode.load().num_preemptions == 1
        assert decode.next_pulls(0.0) == [], "newer work waits behind it"

    def test_is_recomputed_from_all_of_its_tokens(self) -> None:
        decode = scheduler(num_blocks=6)
        _, second = decoding(decode, 47, 31)
        run_step(decode)
        for _ in range(16):
            assert shape(run_step(decode)[0]) == [(0, 1)], (
                "the first took the last block, the second waits with its own"
            )
        assert second.state is State.RUNNING
        assert shape(run_step(decode, ended={0})[0]) == [(0, 1)]
        assert (second.state, second.num_tokens) == (State.PREEMPTED, 33)
        batch, outcome = run_step(decode)
        assert (shape(batch), ids(outcome.sampled)) == ([(1, 33)], [1])
        assert second.num_tokens == 34

    def test_goes_on_in_order_when_several_were_preempted(self) -> None:
        decode = scheduler(num_blocks=6)
        decoding(decode, 16, 16, 16, 16)
        run_step(decode)
        assert decode.pool.num_free == 0
        assert decode.load().num_preemptions >= 1
        order: list[int] = []
        while decode.load().num_running or decode.load().num_queued:
            batch = decode.next_batch(0.0)
            assert batch is not None
            over = {s.id for s, n in batch.items if s.num_tokens > 40 and s.num_computed + n == s.num_tokens}
            order += ids(decode.complete(batch, over, 0.0).finished)
        assert order == [0, 1, 2, 3]

    def test_the_only_one_is_never_preempted_and_ends_when_memory_is_full(self) -> None:
        decode = scheduler(num_blocks=2)
        (sequence,) = decoding(decode, 20)
        finished: list[Sequence] = []
        for _ in range(12):
            finished += run_step(decode)[1].finished
        assert (finished, sequence.num_tokens) == ([sequence], 33), "32 tokens have KV, the 33rd was sampled from them"
        assert decode.load().num_preemptions == 0
        assert decode.pool.num_free == 2

    def test_the_last_come_keeps_its_blocks_while_it_waits_for_one(self) -> None:
        decode = scheduler(num_blocks=4)
        _, last = decoding(decode, 17, 31)
        run_step(decode)
        assert shape(run_step(decode)[0]) == [(0, 1)], "nobody younger has a block for it"
        assert (last.state, len(last.blocks)) == (State.RUNNING, 2)
        decode.add(hand_off(2, 1), 0.0)
        assert shape(run_step(decode, ended={0})[0]) == [(0, 1)]
        assert decode.next_pulls(0.0) == [], "what came free is for what runs"
        assert shape(run_step(decode)[0]) == [(1, 1)]
        assert ids(decode.next_pulls(0.0)) == [2]
        assert decode.load().num_preemptions == 0

    def test_a_batch_in_flight_keeps_its_blocks(self) -> None:
        decode = scheduler(num_blocks=4, max_in_flight=2)
        first, second = decoding(decode, 31, 31)
        one, two = decode.next_batch(0.0), decode.next_batch(0.0)
        assert one is not None
        assert two is not None
        assert (shape(one), shape(two)) == ([(0, 1)], [(1, 1)])
        decode.complete(one, (), 0.0)
        assert decode.next_batch(0.0) is None, "the device still writes to the blocks it would take"
        assert second.state is State.RUNNING
        decode.complete(two, (), 0.0)
        assert shape(decode.next_batch(0.0)) == [(0, 1)]
        assert (second.state, len(first.blocks)) == (State.PREEMPTED, 3)


class TestMicroBatches:
    def test_running_sequences_are_split_evenly(self) -> None:
        decode = scheduler(max_in_flight=3)
        decoding(decode, *[10] * 8)
        batches = [decode.next_batch(0.0) for _ in range(4)]
        assert [shape(batch) for batch in batches] == [
            [(0, 1), (1, 1), (2, 1)],
            [(3, 1), (4, 1), (5, 1)],
            [(6, 1), (7, 1)],
            [],
        ]

    def test_they_even_out_again_when_some_end_and_some_join(self) -> None:
        decode = scheduler(max_in_flight=2)
        decoding(decode, *[10] * 6)
        in_flight = [decode.next_batch(0.0), decode.next_batch(0.0)]
        sizes = []
        for turn in range(6):
            batch = in_flight.pop(0)
            assert batch is not None
            decode.complete(batch, {0, 1} if turn == 0 else (), 0.0)
            in_flight.append(decode.next_batch(0.0))
            sizes.append(sorted(len(shape(batch)) for batch in in_flight))
        assert sizes[-1] == [2, 2]


class TestAbort:
    def test_waiting(self) -> None:
        decode = scheduler(num_blocks=4)
        decoding(decode, 40)
        for id in (1, 2):
            decode.add(hand_off(id, 40), 0.0)
        assert ids(decode.abort(1, 0.0).dropped) == [1]
        load = decode.load()
        assert (load.num_queued, load.num_queued_tokens) == (1, 40)
        run_step(decode, ended={0})
        assert ids(decode.next_pulls(0.0)) == [2]

    @pytest.mark.parametrize("end", [DecodeScheduler.pulled, DecodeScheduler.pull_failed])
    def test_pulling_keeps_its_blocks_until_the_bytes_have_come(
        self, end: Callable[[DecodeScheduler, int, float], Outcome]
    ) -> None:
        decode = scheduler()
        sequence = hand_off(0, 20)
        decode.add(sequence, 0.0)
        decode.next_pulls(0.0)
        assert decode.abort(0, 0.0).dropped == []
        assert decode.abort(0, 0.0).dropped == []
        assert (len(sequence.blocks), 0 in decode) == (2, True)
        assert end(decode, 0, 0.0).dropped == [sequence]
        assert (decode.pool.num_free, 0 in decode) == (64, False)

    def test_between_two_batches(self) -> None:
        decode = scheduler()
        decoding(decode, 20, 20)
        run_step(decode)
        assert ids(decode.abort(0, 0.0).dropped) == [0]
        assert shape(decode.next_batch(0.0)) == [(1, 1)]

    def test_in_a_batch_in_flight(self) -> None:
        decode = scheduler()
        first, second = decoding(decode, 20, 20)
        batch = decode.next_batch(0.0)
        assert batch is not None
        assert decode.abort(0, 0.0).dropped == []
        assert len(first.blocks) == 2
        outcome = decode.complete(batch, {0}, 0.0)
        assert (outcome.dropped, outcome.sampled, outcome.finished) == ([first], [second], [])

    def test_preempted(self) -> None:
        decode = scheduler(num_blocks=4)
        decoding(decode, 31, 31)
        run_step(decode)
        run_step(decode)
        assert ids(decode.abort(1, 0.0).dropped) == [1]
        assert ids(decode.abort(0, 0.0).dropped) == [0]
        assert decode.pool.num_free == 4
        assert decode.next_batch(0.0) is None
        assert decode.load().num_queued == 0

    def test_unknown(self) -> None:
        assert scheduler().abort(9, 0.0).dropped == []


def test_load() -> None:
    decode = scheduler(num_blocks=10, chunk_tokens=16)
    decoding(decode, 20)
    decode.add(Sequence(1, 40), 0.0)
    run_step(decode)
    decode.add(hand_off(2, 20), 0.0)
    decode.next_pulls(0.0)
    decode.add(hand_off(3, 90), 0.0)
    load = decode.load()
    assert load.num_running == 3, "running and being pulled"
    assert load.num_queued == 1
    assert load.num_queued_tokens == 90 + (40 - 16), "to be pulled, and to be computed here"
    assert (load.num_free_blocks, load.num_blocks, load.block_size) == (10 - 2 - 3 - 2, 10, 16)
    assert decode.expire(1e9).dropped == [], "what waits for blocks has no lease here"
