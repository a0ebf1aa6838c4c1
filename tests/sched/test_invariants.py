"""Hypothesis drives each scheduler through any order of events and checks the protocol's promises after every one.

Blocks: exactly one owner each, free + owned = all, a generation moves when its block is freed, the device's blocks stay
its own. Order: first come, first served. Life: every sequence ends exactly once, somebody can always go on, and when
nothing is left all blocks are free.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.sched.support import Auditor, CountedPool, ids

from distserve.sched.base import Batch, Sequence, State
from distserve.sched.colocated import colocated_scheduler
from distserve.sched.continuous import ContinuousScheduler
from distserve.sched.decode import DecodeScheduler
from distserve.sched.policy import ColocatedPolicy, DecodePolicy, PrefillPolicy
from distserve.sched.prefill import PrefillScheduler
from distserve.sched.turns import TurnsScheduler

BLOCK_SIZE = 4
TURNS = settings(
    max_examples=50,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
PIECES = st.integers(0, 10**6)  # picks one of the sequences that are there


class PrefillMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(1, 12), knee=st.integers(1, 40), size=st.integers(1, 4), stages=st.integers(1, 3)
    )
    def begin(self, num_blocks: int, knee: int, size: int, stages: int) -> None:
        self.pool = CountedPool(num_blocks, BLOCK_SIZE)
        self.policy = PrefillPolicy(max_batch_tokens=knee, max_batch_size=size, lease=10.0)
        self.scheduler = PrefillScheduler(self.pool, self.policy, max_in_flight=stages)
        self.auditor = Auditor(self.pool)
        self.now = 0.0
        self.next_id = 0
        self.last_place = -1  # of the sequences that were batched
        self.handles: list[tuple[Sequence, list[int], list[int]]] = []

    @rule(share=st.floats(0.01, 1.0))
    def add(self, share: float) -> None:
        sequence = Sequence(self.next_id, max(1, int(share * self.pool.capacity)))
        self.next_id += 1
        self.scheduler.add(sequence, self.now)
        self.auditor.added(sequence)

    @rule()
    def launch(self) -> None:
        batch = self.scheduler.next_batch(self.now)
        if batch is None:
            full = len(self.auditor.in_flight) >= self.scheduler._max_in_flight
            queued = [s for s in self.auditor.live.values() if s.state is State.QUEUED]
            assert full or not queued or self.pool.blocks_for(queued[0].num_tokens) > self.pool.num_free
            return
        self.auditor.launched(batch)
        assert len(batch.items) <= self.policy.max_batch_size
        assert batch.num_tokens <= self.policy.max_batch_tokens or len(batch.items) == 1
        for sequence, n in batch.items:
            assert n == sequence.num_tokens, "prompts are not cut"
            assert sequence.place > self.last_place, "first come, first served"
            self.last_place = sequence.place
        queued = [s for s in self.auditor.live.values() if s.state is State.QUEUED]
        assert all(s.place > self.last_place for s in queued), "somebody was passed"

    @precondition(lambda self: self.auditor.in_flight)
    @rule(ended=st.sets(st.integers(0, 3)))
    def complete(self, ended: set[int]) -> None:
        batch = self.auditor.in_flight[0]
        before = self.auditor.completing(batch)
        over = {s.id for i, (s, _) in enumerate(batch.items) if i in ended}
        outcome = self.scheduler.complete(batch, over, self.now)
        self.auditor.completed(batch, before, outcome)
        for sequence in outcome.held:
            assert sequence.state is State.HELD
            assert sequence.lease == self.now + self.policy.lease
            self.handles.append((sequence, list(sequence.blocks), [self.pool.generations[b] for b in sequence.blocks]))

    @rule(piece=PIECES)
    def abort(self, piece: int) -> None:
        self.auditor.ended(self.scheduler.abort(self._some_id(piece), self.now))

    @rule(piece=PIECES)
    def release(self, piece: int) -> None:
        some = self._some_id(piece)
        held = some in self.auditor.live and self.auditor.live[some].state is State.HELD
        outcome = self.scheduler.release(some, self.now)
        assert ids(outcome.dropped) == [some] * held
        self.auditor.ended(outcome)

    @rule(piece=PIECES)
    def renew(self, piece: int) -> None:
        some = self._some_id(piece)
        held = some in self.auditor.live and self.auditor.live[some].state is State.HELD
        assert self.scheduler.renew(some, self.now) is held

    @rule(seconds=st.floats(0.0, 8.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        due = {s.id for s in self.auditor.live.values() if s.state is State.HELD and s.lease <= self.now}
        outcome = self.scheduler.expire(self.now)
        assert set(ids(outcome.dropped)) == due
        self.auditor.ended(outcome)

    @invariant()
    def blocks_have_one_owner(self) -> None:
        self.auditor.check()
        load = self.scheduler.load()
        states = [s.state for s in self.auditor.live.values()]
        assert (load.num_queued, load.num_held) == (states.count(State.QUEUED), states.count(State.HELD))
        waiting = (State.QUEUED, State.RUNNING)
        running = {s.id: n for batch in self.auditor.in_flight for s, n in batch.items}
        queued = {s.id: s.num_tokens for s in self.auditor.live.values() if s.state in waiting}
        assert load.num_queued_tokens == sum((running | queued).values())

    @invariant()
    def a_handle_is_true_or_known_to_be_false(self) -> None:
        for sequence, blocks, generations in self.handles:
            now = [self.pool.generations[block] for block in blocks]
            if sequence.state is State.HELD:
                assert (sequence.blocks, now) == (blocks, generations)
            else:
                assert all(new > old for new, old in zip(now, generations, strict=True))

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        while self.auditor.live:
            while self.auditor.in_flight:
                self.complete(set())
            self.wait(self.policy.lease)
            self.launch()
        self.blocks_have_one_owner()
        self.a_handle_is_true_or_known_to_be_false()
        assert self.pool.num_free == self.pool.num_blocks
        assert self.scheduler.next_batch(self.now) is None

    def _some_id(self, piece: int) -> int:
        if piece % 2 and self.auditor.live:
            return list(self.auditor.live)[piece % len(self.auditor.live)]
        return piece % (self.next_id + 1)  # also one that is over, and one that never was


class ContinuousMachine(RuleBasedStateMachine):
    """What decode and colocated schedulers have in common; `make` and `check_batch` differ."""

    scheduler: ContinuousScheduler

    @initialize(
        num_blocks=st.integers(1, 16),
        size=st.integers(1, 6),
        chunk=st.integers(6, 24),
        watermark=st.integers(0, 3),
        stages=st.integers(1, 3),
    )
    def begin(self, num_blocks: int, size: int, chunk: int, watermark: int, stages: int) -> None:
        self.pool = CountedPool(num_blocks, BLOCK_SIZE)
        self.size, self.chunk, self.stages = size, chunk, stages
        self.make(watermark)
        self.auditor = Auditor(self.pool)
        self.left: dict[int, int] = {}  # tokens until the world says that it ended
        self.next_id = 0
        self.admitted: set[int] = set()
        self.work = 0  # tokens that were ever asked for

    def make(self, watermark: int) -> None:
        raise NotImplementedError

    def check_batch(self, batch: Batch) -> None:
        raise NotImplementedError

    @rule(share=st.floats(0.01, 0.6), output=st.integers(1, 24))
    def add(self, share: float, output: int) -> None:
        self._add(Sequence(self.next_id, max(1, int(share * self.pool.capacity))), output)

    def _add(self, sequence: Sequence, output: int) -> None:
        self.next_id += 1
        self.scheduler.add(sequence, 0.0)
        self.auditor.added(sequence)
        self.left[sequence.id] = output
        self.work += sequence.num_tokens + output

    @rule()
    def launch(self) -> None:
        computed = {s.id: s.num_computed for s in self.auditor.live.values()}
        batch = self.scheduler.next_batch(0.0)
        self._check_admissions()
        for sequence in self.auditor.live.values():
            if sequence.state is State.PREEMPTED and computed[sequence.id]:
                assert batch is not None, "blocks were taken from it for nobody"
                assert min(s.place for s, _ in batch.items) < sequence.place, "an older one yielded to a younger one"
        if batch is None:
            assert self.auditor.in_flight or self._pulling() or not self._computable(), "everybody waits for ever"
            return
        self.auditor.launched(batch)
        assert sum(s.state is State.RUNNING for s in self.auditor.live.values()) <= self.size
        self.check_batch(batch)

    @precondition(lambda self: self.auditor.in_flight)
    @rule()
    def complete(self) -> None:
        batch = self.auditor.in_flight[0]
        before = self.auditor.completing(batch)
        ended, full = set(), set()
        for sequence, n in batch.items:
            if sequence.state is State.RUNNING and sequence.num_computed + n == sequence.num_tokens:
                self.left[sequence.id] -= 1
                if self.left[sequence.id] == 0:
                    ended.add(sequence.id)
                elif sequence.num_tokens == self.pool.capacity:
                    full.add(sequence.id)
        outcome = self.scheduler.complete(batch, ended, 0.0)
        self.auditor.completed(batch, before, outcome)
        assert set(ids(outcome.finished)) == ended | full

    @rule(piece=PIECES)
    def abort(self, piece: int) -> None:
        some = piece % (self.next_id + 1)
        sequence = self.auditor.live.get(some)
        busy = sequence is not None and (sequence.state in (State.PULLING, State.ABORTED) or sequence.scheduled > 0)
        outcome = self.scheduler.abort(some, 0.0)
        assert ids(outcome.dropped) == [some] * (sequence is not None and not busy)
        self.auditor.ended(outcome)

    @invariant()
    def blocks_have_one_owner(self) -> None:
        self.auditor.check()
        load = self.scheduler.load()
        queued = [s for s in self.auditor.live.values() if s.state in (State.QUEUED, State.WAITING, State.PREEMPTED)]
        running = [s for s in self.auditor.live.values() if s.state is State.RUNNING]
        assert load.num_queued == len(queued)
        assert load.num_running == len(running) + self._pulling()
        behind = sum(n for s in running if (n := s.num_tokens - s.num_computed) > 1)
        assert load.num_queued_tokens == behind + sum(s.num_kv_tokens or s.num_tokens for s in queued)

    def teardown(self) -> None:
        """Without new work everything ends in a bounded number of steps: no starvation, no livelock."""
        if not hasattr(self, "scheduler"):
            return
        # Whenever blocks are taken from a sequence an older one moves on, so none is computed more often than there are
        # older ones; and in each round of `stages` batches somebody computes a token.
        bound = self.stages * (self.work * (len(self.auditor.live) + 1) + 10)
        for _ in range(bound):
            if not self.auditor.live:
                break
            self.settle()
            if self.auditor.in_flight:
                self.complete()
            self.launch()
        assert not self.auditor.live, f"not over after {bound} steps"
        self.blocks_have_one_owner()
        assert self.pool.num_free == self.pool.num_blocks
        assert self.scheduler.next_batch(0.0) is None

    def settle(self) -> None:
        """What the world does meanwhile."""

    def _check_admissions(self) -> None:
        live = self.auditor.live.values()
        new = [s for s in live if s.blocks and s.id not in self.admitted]
        self.admitted.update(s.id for s in new)
        waiting = [s.place for s in live if s.state in (State.QUEUED, State.WAITING, State.PREEMPTED)]
        for sequence in new:
            assert all(place > sequence.place for place in waiting), "somebody older was passed"

    def _pulling(self) -> int:
        return self.scheduler._num_pulling

    def _computable(self) -> bool:
        return bool(self.auditor.live)


class DecodeMachine(ContinuousMachine):
    scheduler: DecodeScheduler

    def make(self, watermark: int) -> None:
        self.policy = DecodePolicy(max_batch_size=self.size, chunk_tokens=self.chunk, watermark_blocks=watermark)
        self.scheduler = DecodeScheduler(self.pool, self.policy, max_in_flight=self.stages)
        self.pulls: list[int] = []
        self.was_pulled: set[int] = set()

    def check_batch(self, batch: Batch) -> None:
        assert sum(n for _, n in batch.items if n > 1) <= self.chunk
        assert all(not s.num_kv_tokens or s.num_computed >= s.num_kv_tokens for s, _ in batch.items), "not pulled yet"

    @rule(share=st.floats(0.01, 0.6), output=st.integers(1, 24), more=st.integers(1, 6))
    def add_hand_off(self, share: float, output: int, more: int) -> None:
        num_kv_tokens = max(1, int(share * self.pool.capacity))
        num_tokens = min(num_kv_tokens + (more if more > 4 else 1), self.pool.capacity)
        if num_tokens > num_kv_tokens:
            self._add(Sequence(self.next_id, num_tokens, num_kv_tokens=num_kv_tokens), output)

    @rule()
    def next_pulls(self) -> None:
        pulls = self.scheduler.next_pulls(0.0)
        for sequence in pulls:
            assert sequence.state is State.PULLING
            assert sequence.id not in self.was_pulled, "pulled twice: its handle may be long spent"
            self.was_pulled.add(sequence.id)
            assert len(sequence.blocks) == self.pool.blocks_for(sequence.num_kv_tokens)
            self.pulls.append(sequence.id)
        self._check_admissions()

    @precondition(lambda self: self.pulls)
    @rule(piece=PIECES, fails=st.booleans())
    def end_pull(self, piece: int, fails: bool) -> None:
        some = self.pulls.pop(piece % len(self.pulls))
        aborted = self.auditor.live[some].state is State.ABORTED
        end = self.scheduler.pull_failed if fails else self.scheduler.pulled
        outcome = end(some, 0.0)
        assert ids(outcome.dropped) == [some] * (fails or aborted)
        self.auditor.ended(outcome)

    @rule(piece=PIECES, fails=st.booleans())
    def late_word_of_a_pull(self, piece: int, fails: bool) -> None:
        some = piece % (self.next_id + 1)
        if some not in self.pulls:
            outcome = (self.scheduler.pull_failed if fails else self.scheduler.pulled)(some, 0.0)
            assert outcome.dropped == []

    def settle(self) -> None:
        while self.pulls:
            self.end_pull(0, False)
        self.next_pulls()

    def _computable(self) -> bool:
        """Whether somebody should run although `next_pulls` was not asked."""
        return any(s.state is State.RUNNING for s in self.auditor.live.values())


class TurnsMachine(DecodeMachine):
    """Micro-batches that keep their members; a turn may pass although somebody of another could run."""

    def make(self, watermark: int) -> None:
        super().make(watermark)
        self.stages = max(2, self.stages)
        self.scheduler = TurnsScheduler(self.pool, self.policy, max_in_flight=self.stages)

    def _computable(self) -> bool:
        return super()._computable() and not self.auditor.in_flight


class ChunkedMachine(ContinuousMachine):
    policy = "chunked"

    def make(self, watermark: int) -> None:
        policy = ColocatedPolicy(
            self.policy,  # type: ignore[arg-type]
            max_batch_size=self.size,
            chunk_tokens=self.chunk,
            max_batch_tokens=self.chunk,
            watermark_blocks=watermark,
        )
        self.scheduler = colocated_scheduler(self.pool, policy, max_in_flight=self.stages)

    def check_batch(self, batch: Batch) -> None:
        assert batch.num_tokens <= self.chunk


class PrefillFirstMachine(ChunkedMachine):
    policy = "prefill-first"

    def check_batch(self, batch: Batch) -> None:
        prompts = [n for s, n in batch.items if s.num_computed == 0]
        assert len(prompts) in (0, len(batch.items)), "prompts and decodes do not share a batch"
        assert batch.num_tokens <= self.chunk or len(prompts) <= 1
        assert all(s.num_computed + n == s.num_tokens for s, n in batch.items), "prompts are not cut"


# Hypothesis finds a short example of a failure but is slow; the same machines at random go through far more.

MACHINES = {
    machine.__name__: machine
    for machine in (PrefillMachine, DecodeMachine, TurnsMachine, ChunkedMachine, PrefillFirstMachine)
}


@pytest.mark.parametrize("name", MACHINES)
def test_at_random(name: str) -> None:
    for seed in range(200):
        rng = random.Random(seed)
        machine = MACHINES[name]()
        try:
            play(machine, rng, turns=60)
        except AssertionError as error:
            raise AssertionError(f"{name}, seed {seed}: {error}") from error


def play(machine: Any, rng: random.Random, turns: int) -> None:
    if isinstance(machine, PrefillMachine):
        machine.begin(rng.randint(1, 12), rng.randint(1, 40), rng.randint(1, 4), rng.randint(1, 3))
    else:
        machine.begin(rng.randint(1, 16), rng.randint(1, 6), rng.randint(6, 24), rng.randint(0, 3), rng.randint(1, 3))
    events = [event for event in EVENTS if hasattr(machine, event)]
    weights = rng.choices([1, 1, 2, 5, 10], k=len(events))  # some seeds abort much, others hardly ever complete
    for event in rng.choices(events, weights, k=turns):
        if (event == "complete" and not machine.auditor.in_flight) or (event == "end_pull" and not machine.pulls):
            continue
        EVENTS[event](machine, rng)
        machine.blocks_have_one_owner()
        if isinstance(machine, PrefillMachine):
            machine.a_handle_is_true_or_known_to_be_false()
    machine.teardown()


def complete(machine: Any, rng: random.Random) -> None:
    if isinstance(machine, PrefillMachine):
        machine.complete(set(range(rng.randint(0, 2))))
    else:
        machine.complete()


def add(machine: Any, rng: random.Random) -> None:
    if isinstance(machine, PrefillMachine):
        machine.add(rng.random() ** 3)
    else:
        machine.add(rng.uniform(0.01, 0.6), rng.randint(1, 24))


EVENTS: dict[str, Callable[[Any, random.Random], None]] = {
    "add": add,
    "add_hand_off": lambda machine, rng: machine.add_hand_off(
        rng.uniform(0.01, 0.6), rng.randint(1, 24), rng.randint(1, 6)
    ),
    "launch": lambda machine, rng: machine.launch(),
    "complete": complete,
    "abort": lambda machine, rng: machine.abort(rng.randrange(10**6)),
    "release": lambda machine, rng: machine.release(rng.randrange(10**6)),
    "renew": lambda machine, rng: machine.renew(rng.randrange(10**6)),
    "wait": lambda machine, rng: machine.wait(rng.uniform(0, 8)),
    "next_pulls": lambda machine, rng: machine.next_pulls(),
    "end_pull": lambda machine, rng: machine.end_pull(rng.randrange(10**6), rng.random() < 0.2),
    "late_word_of_a_pull": lambda machine, rng: machine.late_word_of_a_pull(rng.randrange(10**6), rng.random() < 0.5),
}


def case(machine: Any) -> Any:
    machine.TestCase.settings = TURNS
    return machine.TestCase


TestPrefill = case(PrefillMachine)
TestDecode = case(DecodeMachine)
TestChunked = case(ChunkedMachine)
TestPrefillFirst = case(PrefillFirstMachine)
