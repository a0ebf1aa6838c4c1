"""The hand-off protocol under thousands of seeded schedules of events and faults (docs/concepts/hand-off.md).

Real schedulers and the real router; gateway, network and memory are toys that check everything they see. Every schedule
is a seed: `run(family, seed)` replays it exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from tests.sched.support import CountedPool
from tests.sched.toy_gateway import Gateway, check_answer
from tests.sched.toy_world import Event, Faults, Instance, World

from distserve.sched.base import Outcome, Sequence
from distserve.sched.continuous import ContinuousScheduler
from distserve.sched.policy import AdmissionPolicy

CALM_FROM = 3.0  # seconds; faults happen before
END = 60.0  # by then all must be over: deadlines and leases are far shorter

FAMILIES = {
    "no faults": Faults(),
    "deaths": Faults(deaths=0.4),
    "hangs": Faults(hangs=0.3),
    "messages": Faults(loss=0.03, double=0.1, late=0.05, reorder=True),
    "corruption": Faults(corrupt=0.03, broken=0.02),
    "leases": Faults(slow=0.4, silent=0.9),
    "clients": Faults(leaves=0.7),
    "gateway dies": Faults(gateway_dies=True, leaves=0.2, deaths=0.2, late=0.1),
    "everything": Faults(0.01, 0.05, 0.03, True, 0.2, 0.1, 0.01, 0.01, 0.1, 0.3, 0.3),
}
SEEDS = 500  # of each family


def run(family: str, seed: int) -> Counter[str]:
    """One schedule; raises `AssertionError` where a promise was broken. Returns what happened in it."""
    faults = FAMILIES[family]
    world = World(seed, faults, CALM_FROM)
    rng = world.rng
    gateway = Gateway(world, AdmissionPolicy(max_requests=rng.choice([8, 100]), max_wait=rng.choice([0.05, 60.0])))
    roles = ["prefill"] * rng.randint(1, 2) + ["decode"] * rng.randint(1, 2) + ["colocated"] * rng.choice([0, 0, 1])
    for i, role in enumerate(roles):
        name = f"{role}-{i}"
        world.instances[name] = Instance(world, name, role, rng.randint(8, 14), rng.choice([1, 1, 2]), gateway.receive)
        gateway.ready(name, world.instances[name].epoch, role)
    burst = rng.random() < 0.5
    for id in range(rng.randint(4, 14)):
        arrival = rng.uniform(0.0, 0.1 if burst else CALM_FROM - 1.0)
        num_prompt = rng.randint(1, 20)
        world.at(arrival, gateway.arrive, id, num_prompt, rng.choice([1, rng.randint(2, 12)]))
        if rng.random() < faults.leaves:
            world.at(arrival + rng.expovariate(5.0), gateway.leave, id)
    plan_faults(world, gateway)
    while world.now < CALM_FROM or not is_over(world, gateway):
        assert world.now < END, f"not over: {list(gateway.calls.values())}, {list(world.instances.values())}"
        world.run(world.now + 1.0)
    check_end(world, gateway)
    return world.seen


def plan_faults(world: World, gateway: Gateway) -> None:
    """Deaths and hangs at random moments of the time in which faults happen."""
    faults, rng = world.faults, world.rng

    def lose(instance: Instance, delay: float) -> None:
        """Dies now; the gateway notices after `delay`; a new process is ready some time later."""
        epoch = instance.epoch
        instance.die()
        world.at(delay, gateway.gone, instance.name, epoch)
        world.at(delay + rng.uniform(0.1, 4.0), begin, instance)

    def begin(instance: Instance) -> None:
        instance.start()
        gateway.ready(instance.name, instance.epoch, instance.role)

    def die(instance: Instance) -> None:
        if instance.up:
            world.seen[f"{instance.role} died"] += 1
            lose(instance, rng.uniform(0.0001, 0.01))

    def hang(instance: Instance) -> None:
        if instance.up:
            world.seen[f"{instance.role} hung"] += 1
            instance.hung = True
            world.at(rng.uniform(1.0, 1.5), lose, instance, 0.0)

    def gateway_dies() -> None:
        world.seen["gateway died"] += 1
        gateway.die()
        for instance in world.instances.values():
            world.at(0.001, instance.gateway_closed)

    for instance in world.instances.values():
        for rate, fault in ((faults.deaths, die), (faults.hangs, hang)):
            moment = rng.expovariate(rate) if rate else CALM_FROM
            while moment < CALM_FROM:
                world.at(moment, fault, instance)
                moment += rng.expovariate(rate)
    if faults.gateway_dies:
        world.at(rng.uniform(0.01, CALM_FROM) * rng.random(), gateway_dies)


def is_over(world: World, gateway: Gateway) -> bool:
    """Every client was told, and every instance is up and has nothing left to do."""
    return not gateway.calls and all(instance.up and not instance.live for instance in world.instances.values())


def check_end(world: World, gateway: Gateway) -> None:
    for call in gateway.over:
        check_answer(call)
        if call.told != ["refused"]:
            ends = [gateway.ends[call.id, attempt] for attempt in range(1, call.attempt + 1)]
            assert ends[:-1] == ["RETRY"] * (call.attempt - 1)
            assert ends[-1] == ("DONE" if call.told == ["done"] else "FAILED")
    for instance in world.instances.values():
        assert instance.pool.num_free == instance.num_blocks, f"{instance.name} lost blocks"
        assert instance.scheduler.next_batch(world.now) is None
        world.seen["preempted"] += instance.scheduler.load().num_preemptions


def schedules(family: str, seeds: int) -> Iterator[Counter[str]]:
    for seed in range(seeds):
        try:
            yield run(family, seed)
        except AssertionError as error:
            raise AssertionError(f"{error}\nreplay it with run({family!r}, {seed})") from error


# What the schedules of a family must have gone through, or they prove nothing.
REACHED = {
    "no faults": ["preempted", "refused"],
    "deaths": [
        "prefill died",
        "decode died",
        "colocated died",
        "pull failed: gone",
        "hand-off offered to another decode",
        "retry: instance gone",
        "retry: pull failed",
    ],
    "hangs": ["prefill hung", "decode hung", "colocated hung", "hand-off offered to another decode"],
    "messages": [
        "submit doubled",
        "token came twice",
        "gateway ignored word of an attempt that is over",
        "audit dropped an orphan",
        "retry: deadline",
        "retry: instance knows nothing of it",
        "pull failed: generation",
    ],
    "corruption": ["pull failed: digest", "pull failed: transport", "retry: pull failed"],
    "leases": ["lease over", "pull failed: generation", "retry: pull failed"],
    "clients": [
        "client left while PREFILLING",
        "client left while DECODING",
        *(f"abort while {state}" for state in ("queued", "running", "held", "waiting", "pulling", "preempted")),
    ],
    "gateway dies": ["gateway died", "submit of a dead gateway"],
    "everything": [
        "gateway ignored a message of an epoch that is over",
        "instance ignored a message to an epoch that is over",
        "client left while HANDED_OFF",
        "client left while ADMITTED",
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_promises_hold(family: str) -> None:
    seen = sum(schedules(family, SEEDS), Counter())
    missing = [what for what in REACHED[family] if not seen[what]]
    assert not missing, f"no schedule went through {missing}: these seeds prove nothing about it ({dict(seen)})"
    if family == "no faults":
        assert not [what for what in seen if what.startswith(("retry", "pull failed", "failed"))], dict(seen)


# The proof is worth what it would notice: each of these puts one mistake in, and some schedule must trip over it.


def frees_what_the_device_writes_to(patch: pytest.MonkeyPatch) -> None:
    abort = ContinuousScheduler.abort

    def hasty(self: ContinuousScheduler, sequence_id: int, now: float) -> Outcome:
        sequence = self._sequences.get(sequence_id)
        outcome = abort(self, sequence_id, now)
        if sequence is not None and not outcome.dropped:
            self.pool.free(sequence.blocks)
        return outcome

    patch.setattr(ContinuousScheduler, "abort", hasty)


def reads_without_checks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Instance, "why_not", lambda *_: None)


def keeps_generations(patch: pytest.MonkeyPatch) -> None:
    free = CountedPool.free

    def still(self: CountedPool, blocks: list[int]) -> None:
        before = [(block, self.generations[block]) for block in blocks]
        free(self, blocks)
        for block, generation in before:
            self.generations[block] = generation

    patch.setattr(CountedPool, "free", still)


def has_one_epoch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(World, "next_epoch", lambda _: 1)


def streams_whatever_comes(patch: pytest.MonkeyPatch) -> None:
    on_event = Gateway.on_event

    def trusting(self: Gateway, place: tuple[str, int], event: Event) -> None:
        call = self.calls.get(event.key[0])
        on_event(self, place, event if call is None else event._replace(number=len(call.output)))

    patch.setattr(Gateway, "on_event", trusting)


def admits_nobody_above_the_watermark(patch: pytest.MonkeyPatch) -> None:
    def strict(self: ContinuousScheduler, sequence: Sequence) -> bool:
        return self.pool.blocks_for(sequence.num_tokens) + 4 <= self.pool.num_free

    patch.setattr(ContinuousScheduler, "_has_room", strict)


@pytest.mark.parametrize(
    ("mistake", "family"),
    [
        (frees_what_the_device_writes_to, "clients"),
        (reads_without_checks, "leases"),
        (reads_without_checks, "corruption"),
        (reads_without_checks, "deaths"),
        (keeps_generations, "leases"),
        (has_one_epoch, "everything"),
        (streams_whatever_comes, "messages"),
        (admits_nobody_above_the_watermark, "no faults"),
    ],
)
def test_would_notice(
    mistake: Callable[[pytest.MonkeyPatch], None], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)

    def run_all() -> None:
        for seed in range(SEEDS):
            run(family, seed)

    with pytest.raises((AssertionError, LookupError)):
        run_all()


def test_a_seed_replays_exactly() -> None:
    assert run("everything", 7) == run("everything", 7)
