import pytest
from tests.sched.support import ids, run_step, shape

from distserve.errors import RequestError
from distserve.sched.base import HoldingScheduler, Sequence, State
from distserve.sched.blocks import BlockPool
from distserve.sched.policy import PrefillPolicy
from distserve.sched.prefill import PrefillScheduler


def scheduler(num_blocks: int = 64, max_in_flight: int = 1, **policy: float) -> PrefillScheduler:
    return PrefillScheduler(BlockPool(num_blocks, 16), PrefillPolicy(**policy), max_in_flight=max_in_flight)  # type: ignore[arg-type]


def add(target: PrefillScheduler, *lengths: int, first: int = 0) -> list[Sequence]:
    sequences = [Sequence(first + i, n) for i, n in enumerate(lengths)]
    for sequence in sequences:
        target.add(sequence, 0.0)
    return sequences


def test_keeps_the_contract() -> None:
    holding: HoldingScheduler = scheduler()
    assert holding.next_batch(0.0) is None


def test_batches_whole_prompts_up_to_the_knee_first_come_first_served() -> None:
    prefill = scheduler(max_batch_tokens=100)
    add(prefill, 60, 50, 30, 10, 10)
    assert shape(prefill.next_batch(0.0)) == [(0, 60)]  # 30 would fit, but 50 came before it
    assert prefill.next_batch(0.0) is None, "one batch at a time"


def test_fills_the_batch_to_the_knee_exactly() -> None:
    prefill = scheduler(max_batch_tokens=100)
    add(prefill, 60, 40, 1)
    assert shape(prefill.next_batch(0.0)) == [(0, 60), (1, 40)]


def test_a_prompt_beyond_the_knee_goes_alone() -> None:
    prefill = scheduler(max_batch_tokens=100)
    add(prefill, 300, 10, 200, 20)
    assert shape(run_step(prefill)[0]) == [(0, 300)]
    assert shape(run_step(prefill)[0]) == [(1, 10)]
    assert shape(run_step(prefill)[0]) == [(2, 200)]
    assert shape(run_step(prefill)[0]) == [(3, 20)]


def test_batch_size_is_limited() -> None:
    prefill = scheduler(max_batch_size=2)
    add(prefill, 5, 5, 5)
    assert shape(prefill.next_batch(0.0)) == [(0, 5), (1, 5)]


def test_pipeline_stages_each_get_a_batch() -> None:
    prefill = scheduler(max_batch_size=1, max_in_flight=2)
    add(prefill, 5, 6, 7)
    first, second = prefill.next_batch(0.0), prefill.next_batch(0.0)
    assert first is not None
    assert (shape(first), shape(second), shape(prefill.next_batch(0.0))) == ([(0, 5)], [(1, 6)], [])
    prefill.complete(first, (), 0.0)
    assert shape(prefill.next_batch(0.0)) == [(2, 7)]


def test_batches_complete_in_order() -> None:
    prefill = scheduler(max_batch_size=1, max_in_flight=2)
    add(prefill, 5, 6)
    prefill.next_batch(0.0)
    second = prefill.next_batch(0.0)
    assert second is not None
    with pytest.raises(AssertionError, match="which was made earlier"):
        prefill.complete(second, (), 0.0)


def test_a_prefilled_sequence_is_held_until_released() -> None:
    prefill = scheduler()
    (sequence,) = add(prefill, 40)
    _, outcome = run_step(prefill)
    assert outcome.sampled == outcome.held == [sequence]
    assert (sequence.state, sequence.num_tokens, sequence.num_computed) == (State.HELD, 41, 40)
    assert len(sequence.blocks) == 3, "the blocks hold the prompt; the sampled token's KV is computed by decode"
    assert prefill.load().num_held == 1
    assert prefill.release(0, 1.0).dropped == [sequence]
    assert sequence.state is State.RELEASED
    assert 0 not in prefill
    assert prefill.pool.num_free == 64
    assert prefill.release(0, 1.0).dropped == [], "said twice changes nothing"


def test_a_sequence_that_ended_with_its_first_token_is_not_held() -> None:
    prefill = scheduler()
    first, second = add(prefill, 40, 20)
    _, outcome = run_step(prefill, ended={0})
    assert (outcome.finished, outcome.held) == ([first], [second])
    assert first.state is State.FINISHED
    assert prefill.pool.num_free == 62


def test_a_retried_request_computes_its_output_too() -> None:
    prefill = scheduler()
    prefill.add(Sequence(7, num_tokens=30 + 12, attempt=2), 0.0)
    batch, outcome = run_step(prefill)
    assert shape(batch) == [(7, 42)]
    assert outcome.held[0].num_computed == 42


def test_when_blocks_run_out_the_head_of_the_queue_waits_and_nobody_passes() -> None:
    prefill = scheduler(num_blocks=4)
    add(prefill, 48)
    run_step(prefill)
    add(prefill, 32, 1, first=1)
    assert prefill.next_batch(0.0) is None, "one block is free, but the short prompt may not pass the long one"
    prefill.release(0, 0.0)
    assert shape(prefill.next_batch(0.0)) == [(1, 32), (2, 1)]


def test_a_prompt_that_could_never_fit_is_refused_at_once() -> None:
    prefill = scheduler(num_blocks=4)
    with pytest.raises(RequestError, match="65 tokens"):
        prefill.add(Sequence(0, 65), 0.0)
    assert 0 not in prefill
    assert prefill.load().num_queued == 0
    prefill.add(Sequence(0, 64), 0.0)


class TestLease:
    def test_ends_without_word_from_the_puller(self) -> None:
        prefill = scheduler(lease=10.0)
        add(prefill, 20)
        run_step(prefill, now=5.0)
        assert prefill.expire(14.9).dropped == []
        assert ids(prefill.expire(15.0).dropped) == [0]
        assert prefill.pool.num_free == 64
        assert not prefill.renew(0, 15.0)

    def test_is_renewed_and_the_order_of_ends_follows(self) -> None:
        prefill = scheduler(lease=10.0)
        add(prefill, 20, 20)
        run_step(prefill, now=0.0)
        assert prefill.renew(0, 5.0)
        assert ids(prefill.expire(10.0).dropped) == [1]
        assert ids(prefill.expire(15.0).dropped) == [0]

    def test_does_not_touch_what_is_queued_or_running(self) -> None:
        prefill = scheduler(lease=1.0, max_batch_size=1)
        add(prefill, 20, 20)
        prefill.next_batch(0.0)
        assert prefill.expire(1000.0).dropped == []
        assert not prefill.renew(0, 0.0)
        assert not prefill.renew(1, 0.0)

    def test_moves_the_generation_so_that_a_late_reader_knows(self) -> None:
        prefill = scheduler(lease=1.0)
        (sequence,) = add(prefill, 40)
        run_step(prefill)
        blocks = list(sequence.blocks)
        promised = [prefill.pool.generations[block] for block in blocks]
        prefill.expire(1.0)
        assert all(prefill.pool.generations[b] != g for b, g in zip(blocks, promised, strict=True))


class TestAbort:
    def test_queued(self) -> None:
        prefill = scheduler()
        first, second = add(prefill, 20, 30)
        assert prefill.abort(0, 0.0).dropped == [first]
        assert first.state is State.ABORTED
        assert prefill.load().num_queued_tokens == 30
        assert shape(prefill.next_batch(0.0)) == [(1, 30)]
        assert second.state is State.RUNNING

    def test_running_keeps_its_blocks_until_the_device_is_done(self) -> None:
        prefill = scheduler()
        first, second = add(prefill, 20, 30)
        batch = prefill.next_batch(0.0)
        assert batch is not None
        assert prefill.abort(0, 0.0).dropped == []
        assert prefill.abort(0, 0.0).dropped == []
        assert prefill.release(0, 0.0).dropped == []
        assert (len(first.blocks), 0 in prefill) == (2, True)
        outcome = prefill.complete(batch, {0}, 0.0)
        assert (outcome.dropped, outcome.sampled, outcome.held) == ([first], [second], [second])
        assert (first.blocks, 0 in prefill) == ([], False)

    def test_held(self) -> None:
        prefill = scheduler()
        (sequence,) = add(prefill, 20)
        run_step(prefill)
        assert prefill.abort(0, 0.0).dropped == [sequence]
        assert prefill.expire(1e9).dropped == []
        assert prefill.pool.num_free == 64

    def test_unknown(self) -> None:
        assert scheduler().abort(3, 0.0).dropped == []


def test_load_counts_queue_batches_and_held() -> None:
    prefill = scheduler(max_batch_size=1)
    add(prefill, 20, 30, 40)
    run_step(prefill)
    prefill.next_batch(0.0)
    load = prefill.load()
    assert (load.num_queued, load.num_running, load.num_held) == (1, 1, 1)
    assert load.num_queued_tokens == 70, "the batch in flight still stands before the next prompt"
    assert (load.num_free_blocks, load.num_blocks, load.block_size) == (64 - 2 - 2, 64, 16)


def test_an_id_may_come_again_when_the_former_is_over() -> None:
    prefill = scheduler()
    add(prefill, 20)
    with pytest.raises(AssertionError, match="is here already"):
        add(prefill, 20)
    prefill.abort(0, 0.0)
    add(prefill, 20)
