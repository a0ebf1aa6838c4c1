import pytest
from tests.sched.support import ids, run_step, shape

from distserve.errors import RequestError
from distserve.sched.base import Scheduler, Sequence, State
from distserve.sched.blocks import BlockPool
from distserve.sched.colocated import ChunkedScheduler, ColocatedScheduler, PrefillFirstScheduler, colocated_scheduler
from distserve.sched.policy import ColocatedPolicy


def chunked(chunk_tokens: int = 32, num_blocks: int = 64, max_batch_size: int = 8, max_in_flight: int = 1) -> Scheduler:
    policy = ColocatedPolicy(chunk_tokens=chunk_tokens, max_batch_size=max_batch_size, watermark_blocks=0)
    return colocated_scheduler(BlockPool(num_blocks, 16), policy, max_in_flight=max_in_flight)


def prefill_first(max_batch_tokens: int = 100, num_blocks: int = 64, max_batch_size: int = 8) -> Scheduler:
    policy = ColocatedPolicy("prefill-first", max_batch_size, max_batch_tokens=max_batch_tokens, watermark_blocks=0)
    return colocated_scheduler(BlockPool(num_blocks, 16), policy)


def add(target: Scheduler, *lengths: int, first: int = 0) -> list[Sequence]:
    sequences = [Sequence(first + i, n) for i, n in enumerate(lengths)]
    for sequence in sequences:
        target.add(sequence, 0.0)
    return sequences


def test_the_policy_names_the_class() -> None:
    assert isinstance(chunked(), ChunkedScheduler)
    assert isinstance(prefill_first(), PrefillFirstScheduler)


@pytest.mark.parametrize("make", [chunked, prefill_first])
def test_nothing_is_pulled_here(make: type[ColocatedScheduler]) -> None:
    with pytest.raises(AssertionError, match="nothing is pulled here"):
        make().add(Sequence(0, 11, num_kv_tokens=10), 0.0)  # type: ignore[call-arg]


class TestChunked:
    def test_decodes_go_first_and_prompts_fill_the_budget(self) -> None:
        target = chunked(chunk_tokens=32)
        add(target, 10, 50, 30)
        steps = [run_step(target) for _ in range(4)]
        assert [shape(batch) for batch, _ in steps] == [
            [(0, 10), (1, 22)],
            [(0, 1), (1, 28), (2, 3)],
            [(0, 1), (1, 1), (2, 27)],
            [(0, 1), (1, 1), (2, 1)],
        ]
        assert [ids(outcome.sampled) for _, outcome in steps] == [[0], [0, 1], [0, 1, 2], [0, 1, 2]]

    def test_a_running_decode_is_never_left_out_for_a_prompt(self) -> None:
        target = chunked(chunk_tokens=8, max_batch_size=8)
        add(target, *[1] * 7, 100)
        run_step(target)
        for _ in range(20):
            batch, _ = run_step(target)
            assert len(batch.items) == 8
            assert batch.num_tokens == 8

    def test_pieces_go_to_the_pipeline_one_batch_at_a_time(self) -> None:
        target = chunked(chunk_tokens=32, max_in_flight=2)
        add(target, 50, 40)
        first, second = target.next_batch(0.0), target.next_batch(0.0)
        assert first is not None
        assert (shape(first), shape(second)) == ([(0, 32)], [(1, 32)])
        target.complete(first, (), 0.0)
        assert shape(target.next_batch(0.0)) == [(0, 18)]

    def test_a_preempted_sequence_is_recomputed_in_chunks(self) -> None:
        target = chunked(chunk_tokens=32, num_blocks=4)
        _, last = add(target, 31, 31)
        run_step(target)
        run_step(target)
        run_step(target)
        assert last.state is State.PREEMPTED
        run_step(target, ended={0})
        assert shape(run_step(target)[0]) == [(1, 32)]
        assert shape(run_step(target)[0]) == [(1, 1)]


class TestPrefillFirst:
    def test_prompts_go_before_decodes_and_are_not_cut(self) -> None:
        target = prefill_first(max_batch_tokens=100)
        add(target, 60, 50, 300)
        assert shape(run_step(target)[0]) == [(0, 60)]
        assert shape(run_step(target)[0]) == [(1, 50)]
        assert shape(run_step(target)[0]) == [(2, 300)], "beyond the limit it goes alone"
        assert shape(run_step(target)[0]) == [(0, 1), (1, 1), (2, 1)]
        add(target, 5, first=3)
        assert shape(run_step(target)[0]) == [(3, 5)]
        assert shape(run_step(target)[0]) == [(0, 1), (1, 1), (2, 1), (3, 1)]

    def test_decodes_while_no_prompt_fits(self) -> None:
        target = prefill_first(num_blocks=8)
        add(target, 80, 60)
        assert shape(run_step(target)[0]) == [(0, 80)]
        assert shape(run_step(target)[0]) == [(0, 1)]
        run_step(target, ended={0})
        assert shape(run_step(target)[0]) == [(1, 60)]

    def test_a_preempted_sequence_is_recomputed_whole(self) -> None:
        target = prefill_first(num_blocks=4)
        _, last = add(target, 31, 31)
        for _ in range(3):
            run_step(target)
        assert last.state is State.PREEMPTED
        run_step(target, ended={0})
        assert shape(run_step(target)[0]) == [(1, 33)]


@pytest.mark.parametrize("make", [chunked, prefill_first])
class TestBoth:
    def test_a_sequence_that_fills_all_memory_ends(self, make: type[ColocatedScheduler]) -> None:
        target: Scheduler = make(num_blocks=2)  # type: ignore[call-arg]
        (sequence,) = add(target, 20)
        finished: list[int] = []
        while not finished:
            finished = ids(run_step(target)[1].finished)
        assert sequence.num_tokens == 33
        assert target.next_batch(0.0) is None

    def test_refuses_what_could_never_fit(self, make: type[ColocatedScheduler]) -> None:
        with pytest.raises(RequestError, match="33 tokens"):
            add(make(num_blocks=2), 33)  # type: ignore[call-arg]

    def test_abort_in_every_state(self, make: type[ColocatedScheduler]) -> None:
        target: Scheduler = make(num_blocks=8)  # type: ignore[call-arg]
        add(target, 16, 16, 120)
        batch = target.next_batch(0.0)
        assert batch is not None
        assert target.abort(0, 0.0).dropped == []
        assert ids(target.abort(2, 0.0).dropped) == [2]
        assert ids(target.complete(batch, (), 0.0).dropped) == [0]
        assert ids(target.abort(1, 0.0).dropped) == [1]
        load = target.load()
        assert (load.num_free_blocks, load.num_running, load.num_queued, load.num_queued_tokens) == (8, 0, 0, 0)
