"""A world for the protocol test: a heap of events, a network that misbehaves, instances with toy memory.

Schedulers and router are the real ones. What computes is a toy, but an honest one: KV memory holds for every slot whose
token it is, a step reads all KV before its own and fails loudly where it finds somebody else's, and a pull reads block
by block while the source goes on living.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.sched.support import CountedPool

from distserve.sched.base import Batch, Load, Outcome, Sequence, State
from distserve.sched.colocated import colocated_scheduler
from distserve.sched.decode import DecodeScheduler
from distserve.sched.policy import ColocatedPolicy, DecodePolicy, PrefillPolicy
from distserve.sched.prefill import PrefillScheduler

LEASE = 1.0
BLOCK_SIZE = 4
TIMER = 0.25  # seconds between two beats, audits, looks at the leases

Key = tuple[int, int]  # request and attempt
Slot = tuple[int, int] | None  # request and position whose KV lies there


@dataclass(frozen=True)
class Faults:
    """How likely each fault is. Messages: per message; the others: per second, instance or request as named."""

    loss: float = 0.0
    double: float = 0.0
    late: float = 0.0
    reorder: bool = False
    deaths: float = 0.0  # per instance and second
    hangs: float = 0.0  # per instance and second
    corrupt: float = 0.0  # per block read
    broken: float = 0.0  # per block read: the transport fails
    slow: float = 0.0  # per pull: it takes longer than a lease
    silent: float = 0.0  # per renewal: it is not sent
    leaves: float = 0.0  # per request: the client goes away at some moment
    gateway_dies: bool = False


class Handle(NamedTuple):
    instance: str
    epoch: int
    key: Key
    num_tokens: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    digest: tuple[tuple[Slot, ...], ...]


class Submit(NamedTuple):
    key: Key
    num_prompt: int
    num_output: int  # tokens that the client has been given
    last: int  # how many tokens the answer will have; known to the executor only
    handle: Handle | None


class Event(NamedTuple):
    """A token: the `number`-th of the answer, from 0."""

    key: Key
    number: int
    token: int
    finish: bool
    handle: Handle | None


def token_of(request: int, number: int) -> int:
    """What the model says: greedy and seeded sampling depend on nothing but the request."""
    return (request * 1_000_003 + number * 7_919) % 50_021


class World:
    """Virtual time, the network, and what all have in common."""

    def __init__(self, seed: int, faults: Faults, calm_from: float) -> None:
        self.rng = random.Random(seed)
        self.faults = faults
        self.calm_from = calm_from  # from here on there are no faults any more
        self.now = 0.0
        self.seen: Counter[str] = Counter()  # what happened, so that a test can tell that it happened at all
        self.instances: dict[str, Instance] = {}
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._epoch = 0
        self._last_delivery: dict[tuple[str, str], float] = {}

    def at(self, delay: float, what: Callable[..., None], *arguments: Any) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay, self._count, what, arguments))

    def run(self, until: float) -> None:
        """Lets everything happen that is due by then."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, what, arguments = heapq.heappop(heap)
            what(*arguments)
        self.now = until

    def happens(self, probability: float) -> bool:
        return probability > 0 and self.now < self.calm_from and self.rng.random() < probability

    def next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def send(self, source: str, target: str, receive: Callable[..., None], *message: Any) -> None:
        """Delivers `receive(*message)` some time later, or not, or twice, in order or not."""
        faults = self.faults
        if self.happens(faults.loss):
            self.seen["message lost"] += 1
            return
        for _ in range(2 if self.happens(faults.double) else 1):
            delay = self.rng.uniform(0.0005, 0.003)
            if self.happens(faults.late):
                delay += self.rng.uniform(0.1, 4.0)
                self.seen["message late"] += 1
            if not (faults.reorder and self.now < self.calm_from):
                arrival = max(self.now + delay, self._last_delivery.get((source, target), 0.0))
                self._last_delivery[source, target] = arrival
                delay = arrival - self.now
            self.at(delay, receive, *message)


@dataclass
class Live:
    """A sequence as its instance knows it."""

    submit: Submit
    sequence: Sequence
    pull_trials: int = 0


@dataclass
class Instance:
    """One replica through all of its epochs: a scheduler, toy memory, and the driver's few lines between them."""

    world: World
    name: str
    role: str
    num_blocks: int
    stages: int
    tell: Callable[..., None] = field(repr=False)  # the gateway's `receive(instance, epoch, kind, what, load)`

    def __post_init__(self) -> None:
        self.epoch = 0  # 0: down
        self.hung = False
        self.deaf = False  # the gateway that it listened to is dead
        self.start()

    def start(self) -> None:
        rng = self.world.rng
        self.epoch = self.world.next_epoch()
        self.hung = False
        self.pool = CountedPool(self.num_blocks, BLOCK_SIZE)
        self.memory: list[list[Slot]] = [[None] * BLOCK_SIZE for _ in range(self.num_blocks)]
        self.live: dict[int, Live] = {}
        self.device_free_at = 0.0
        self.scheduler: Any
        if self.role == "prefill":
            prefill = PrefillPolicy(max_batch_tokens=rng.randint(4, 60), lease=LEASE)
            self.scheduler = PrefillScheduler(self.pool, prefill, max_in_flight=self.stages)
        elif self.role == "decode":
            decode = DecodePolicy(max_batch_size=8, chunk_tokens=rng.randint(1, 20), watermark_blocks=rng.randint(0, 2))
            self.scheduler = DecodeScheduler(self.pool, decode, max_in_flight=self.stages)
        else:
            name: Any = rng.choice(["chunked", "prefill-first"])
            colocated = ColocatedPolicy(name, 8, chunk_tokens=rng.randint(8, 20), watermark_blocks=rng.randint(0, 2))
            self.scheduler = colocated_scheduler(self.pool, colocated, max_in_flight=self.stages)
        self.world.at(TIMER, self.timer, self.epoch)

    def die(self) -> None:
        self.epoch = 0
        self.live = {}

    @property
    def up(self) -> bool:
        return self.epoch != 0 and not self.hung

    # What others tell it

    def receive(self, epoch: int, kind: str, what: Any) -> None:
        if epoch != self.epoch:
            self.world.seen["instance ignored a message to an epoch that is over"] += 1
        elif not self.hung:
            getattr(self, f"on_{kind}")(what)
            self.go_on()

    def on_submit(self, submit: Submit) -> None:
        request, attempt = submit.key
        key = sequence_id(submit.key)
        if key in self.live or self.deaf:
            self.world.seen["submit doubled" if key in self.live else "submit of a dead gateway"] += 1
            return
        for live in list(self.live.values()):
            if live.submit.key[0] == request and live.submit.key[1] < attempt:
                self.on_abort(live.submit.key)
        handle = submit.handle
        sequence = Sequence(
            key,
            num_tokens=submit.num_prompt + submit.num_output,
            attempt=attempt,
            num_kv_tokens=handle.num_tokens if handle else 0,
        )
        self.scheduler.add(sequence, self.world.now)
        self.live[key] = Live(submit, sequence)

    def on_abort(self, key: Key) -> None:
        live = self.live.get(sequence_id(key))
        if live is not None:
            self.world.seen[f"abort while {live.sequence.state.value}"] += 1
        self.forget(self.scheduler.abort(sequence_id(key), self.world.now))

    def on_release(self, key: Key) -> None:
        if self.role == "prefill":
            self.forget(self.scheduler.release(sequence_id(key), self.world.now))

    def on_renew(self, key: Key) -> None:
        if self.role == "prefill":
            self.scheduler.renew(sequence_id(key), self.world.now)

    def on_audit(self, believed: set[Key]) -> None:
        here = {live.submit.key for live in self.live.values()}
        for key in here - believed:
            self.world.seen["audit dropped an orphan"] += 1
            self.on_abort(key)
        for key in here & believed:
            if not self.world.happens(self.world.faults.silent):
                self.on_renew(key)
        unknown = believed - {live.submit.key for live in self.live.values()}
        if unknown:
            self.say("unknown", unknown)

    def gateway_closed(self) -> None:
        """The gateway died. What it said just before may still arrive, and nobody would ask for the answer."""
        self.deaf = True
        if self.up:
            for live in list(self.live.values()):
                self.on_abort(live.submit.key)
            self.go_on()

    # The driver's loop

    def timer(self, epoch: int) -> None:
        if epoch != self.epoch or self.hung:
            return
        for live in self.live.values():
            handle = live.submit.handle
            if handle is not None and live.sequence.state in (State.WAITING, State.PULLING):
                self.to_source(handle, "renew", self.world.faults.silent)
        self.say("beat", None)
        self.go_on()
        self.world.at(TIMER, self.timer, epoch)

    def go_on(self) -> None:
        world, scheduler = self.world, self.scheduler
        expired = scheduler.expire(world.now)
        if expired.dropped:
            world.seen["lease over"] += 1
        self.forget(expired)
        if self.role == "decode":
            for sequence in scheduler.next_pulls(world.now):
                self.pull(self.live[sequence.id])
        while (batch := scheduler.next_batch(world.now)) is not None:
            writes = [(sequence, n, sequence.num_computed, list(sequence.blocks)) for sequence, n in batch.items]
            seconds = 0.02 + 0.002 * batch.num_tokens * world.rng.uniform(0.8, 1.2)
            self.device_free_at = max(world.now, self.device_free_at) + seconds
            world.at(self.device_free_at - world.now, self.executed, self.epoch, batch, writes)
        self.check()

    def executed(self, epoch: int, batch: Batch, writes: list[tuple[Sequence, int, int, list[int]]]) -> None:
        if epoch != self.epoch or self.hung:
            return
        ended = {sequence.id for sequence, n, start, blocks in writes if self.compute(sequence, n, start, blocks)}
        outcome = self.scheduler.complete(batch, ended, self.world.now)
        events = []
        held = {sequence.id for sequence in outcome.held}
        for sequence in outcome.sampled:
            submit = self.live[sequence.id].submit
            number = sequence.num_tokens - 1 - submit.num_prompt
            handle = self.publish(submit.key, sequence) if sequence.id in held else None
            events.append(Event(submit.key, number, token_of(submit.key[0], number), sequence.id in ended, handle))
        for sequence in outcome.finished:
            assert sequence.id in ended
            del self.live[sequence.id]
        self.forget(outcome)
        self.say("events", events)
        self.go_on()

    def compute(self, sequence: Sequence, n: int, start: int, blocks: list[int]) -> bool:
        """Reads the KV of all tokens before, writes that of the next `n`; True: the sampled token is the last."""
        submit = self.live[sequence.id].submit
        request = submit.key[0]
        for position in range(start):
            found = self.memory[blocks[position // BLOCK_SIZE]][position % BLOCK_SIZE]
            assert found == (request, position), f"{self.name} computed request {request} from the KV of {found}"
        for position in range(start, start + n):
            self.memory[blocks[position // BLOCK_SIZE]][position % BLOCK_SIZE] = (request, position)
        return start + n == sequence.num_tokens == submit.num_prompt + submit.last - 1

    def publish(self, key: Key, sequence: Sequence) -> Handle:
        blocks = tuple(sequence.blocks)
        generations = tuple(self.pool.generations[block] for block in blocks)
        digest = tuple(tuple(self.memory[block]) for block in blocks)
        return Handle(self.name, self.epoch, key, sequence.num_computed, blocks, generations, digest)

    # Pulls

    def pull(self, live: Live) -> None:
        """Starts to read the handle's blocks, one after the other, into the sequence's."""
        world = self.world
        handle = live.submit.handle
        assert handle is not None
        live.pull_trials += 1
        slow = world.happens(world.faults.slow)
        last = world.rng.uniform(1.0, 3.0) * LEASE if slow else world.rng.uniform(0.001, 0.05)
        moments = sorted(world.rng.uniform(0, last) for _ in handle.blocks)
        for i, moment in enumerate(moments):
            world.at(moment, self.read, self.epoch, live, live.pull_trials, i)
        world.at(last, self.end_pull, self.epoch, live, live.pull_trials)

    def read(self, epoch: int, live: Live, trial: int, i: int) -> None:
        handle = live.submit.handle
        assert handle is not None
        if epoch != self.epoch or self.hung or trial != live.pull_trials:
            return
        source = self.world.instances[handle.instance]
        if source.epoch != handle.epoch or self.world.happens(self.world.faults.broken):
            reason = "gone" if source.epoch != handle.epoch else "transport"
            self.pull_broke(live, reason)
            return
        slots = list(source.memory[handle.blocks[i]])
        if self.world.happens(self.world.faults.corrupt):
            slots[self.world.rng.randrange(BLOCK_SIZE)] = (-1, -1)
        self.memory[live.sequence.blocks[i]] = slots

    def end_pull(self, epoch: int, live: Live, trial: int) -> None:
        handle = live.submit.handle
        assert handle is not None
        if epoch != self.epoch or self.hung or trial != live.pull_trials:
            return
        source = self.world.instances[handle.instance]
        reason = self.why_not(handle, source, live.sequence.blocks)
        if reason is not None:
            self.pull_broke(live, reason)
            return
        promised = source.live.get(sequence_id(handle.key))
        assert promised is not None, "a stale handle was used"
        assert promised.sequence.state is State.HELD, "a stale handle was used"
        self.forget(self.scheduler.pulled(live.sequence.id, self.world.now))
        self.to_source(handle, "release", 0.0)
        if live.sequence.id in self.live:
            self.say("pulled", live.submit.key)
        self.go_on()

    def why_not(self, handle: Handle, source: Instance, blocks: list[int]) -> str | None:
        """The reader's checks (invariant 4)."""
        if source.epoch != handle.epoch:
            return "gone"
        if any(source.pool.generations[b] != g for b, g in zip(handle.blocks, handle.generations, strict=True)):
            return "generation"
        if tuple(tuple(self.memory[block]) for block in blocks) != handle.digest:
            return "digest"
        return None

    def pull_broke(self, live: Live, reason: str) -> None:
        self.world.seen[f"pull failed: {reason}"] += 1
        if reason in ("transport", "digest") and live.pull_trials == 1:
            self.pull(live)
            return
        live.pull_trials += 1  # what is still to be read of this pull is not
        self.say("failure", live.submit.key)
        self.forget(self.scheduler.pull_failed(live.sequence.id, self.world.now))
        self.go_on()

    def to_source(self, handle: Handle, kind: str, silent: float) -> None:
        if not self.world.happens(silent):
            source = self.world.instances[handle.instance]
            self.world.send(self.name, handle.instance, source.receive, handle.epoch, kind, handle.key)

    # Bookkeeping

    def say(self, kind: str, what: Any) -> None:
        load: Load = self.scheduler.load()
        self.world.send(self.name, "gateway", self.tell, self.name, self.epoch, kind, what, load)

    def forget(self, outcome: Outcome) -> None:
        for sequence in outcome.dropped:
            assert not sequence.blocks
            del self.live[sequence.id]  # KeyError: it ended twice

    def check(self) -> None:
        """Invariants 1 and 2."""
        owned = [block for live in self.live.values() for block in live.sequence.blocks]
        assert len(owned) + self.pool.num_free == self.num_blocks, f"{self.name}: a block is lost or has two owners"
        assert len(set(owned)) == len(owned), f"{self.name}: a block has two owners"


def sequence_id(key: Key) -> int:
    return key[0] << 8 | key[1]
