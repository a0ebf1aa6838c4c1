"""The hand-off protocol under thousands of seeded schedules of events and faults (docs/concepts/hand-off.md).

Real schedulers and the real router; gateway, network and memory are toys that check everything they see. Every schedule
is a seed: `run(family, seed)` replays it exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from tests.sched.toy_gateway import Gateway, check_answer
from tests.sched.toy_world import Faults, Instance, World

from distserve.sched.policy import AdmissionPolicy

CALM_FROM = 8.0  # seconds; faults happen before
END = 60.0  # by then all must be over: deadlines and leases are far shorter

FAMILIES = {
    "no faults": Faults(),
    "deaths": Faults(deaths=0.15),
    "hangs": Faults(hangs=0.1),
    "messages": Faults(loss=0.03, double=0.1, late=0.05, reorder=True),
    "corruption": Faults(corrupt=0.03, broken=0.02),
    "leases": Faults(slow=0.4, silent=0.9),
    "clients": Faults(leaves=0.7),
    "gateway dies": Faults(gateway_dies=True, leaves=0.2, deaths=0.05),
    "everything": Faults(0.01, 0.05, 0.03, True, 0.06, 0.04, 0.01, 0.01, 0.1, 0.3, 0.3),
}
SEEDS = 300


def run(family: str, seed: int) -> Counter[str]:
    """One schedule; raises `AssertionError` where a promise was broken. Returns what happened in it."""
    faults = FAMILIES[family]
    world = World(seed, faults, CALM_FROM)
    rng = world.rng
    gateway = Gateway(world, AdmissionPolicy(max_requests=rng.choice([8, 100]), max_wait=rng.choice([0.05, 60.0])))
    roles = ["prefill"] * rng.randint(1, 2) + ["decode"] * rng.randint(1, 2) + ["colocated"] * rng.choice([0, 0, 1])
    for i, role in enumerate(roles):
        name = f"{role}-{i}"
        world.instances[name] = Instance(world, name, role, rng.randint(8, 20), rng.choice([1, 1, 2]), gateway.receive)
        gateway.ready(name, world.instances[name].epoch, role)
    burst = rng.random() < 0.5
    for id in range(rng.randint(4, 12)):
        arrival = rng.uniform(0.0, 0.1 if burst else CALM_FROM)
        num_prompt = rng.randint(1, 20)
        world.at(arrival, gateway.arrive, id, num_prompt, rng.choice([1, rng.randint(2, 12)]))
        if rng.random() < faults.leaves:
            world.at(arrival + rng.expovariate(5.0), gateway.leave, id)
    plan_faults(world, gateway)
    world.run(END)
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
        world.at(rng.uniform(0.01, CALM_FROM), gateway_dies)


def check_end(world: World, gateway: Gateway) -> None:
    assert not gateway.calls, f"not over: {list(gateway.calls.values())}"
    for call in gateway.over:
        check_answer(call)
        if call.told != ["refused"]:
            ends = [gateway.ends[call.id, attempt] for attempt in range(1, call.attempt + 1)]
            assert ends[:-1] == ["RETRY"] * (call.attempt - 1)
            assert ends[-1] == ("DONE" if call.told == ["done"] else "FAILED")
    for instance in world.instances.values():
        assert not instance.live, f"{instance.name} still has {instance.live}"
        assert instance.pool.num_free == instance.num_blocks, f"{instance.name} lost blocks"
        assert instance.scheduler.next_batch(world.now) is None


def schedules(family: str, seeds: int) -> Iterator[Counter[str]]:
    for seed in range(seeds):
        try:
            yield run(family, seed)
        except AssertionError as error:
            raise AssertionError(f"{error}\nreplay it with run({family!r}, {seed})") from error


@pytest.mark.parametrize("family", FAMILIES)
def test_promises_hold(family: str) -> None:
    seen = sum(schedules(family, SEEDS), Counter())
    print(family, dict(sorted(seen.items())))
