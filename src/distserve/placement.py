"""Which device of this machine each rank of a plan runs on. Knows numbers of devices, not what they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from distserve.errors import PlanError
from distserve.plan import Plan, Replica


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each rank of each instance runs on one machine."""

    ranks: Mapping[str, tuple[tuple[int, ...], ...]]  # by replica name: for each rank the device numbers it may use
    warnings: tuple[str, ...] = ()  # what the person should know (devices shared), a sentence each


def place(
    plan: Plan, devices: Iterable[int], *, share: bool, crowd: bool = False, spread: bool = False, node: str = "node0"
) -> Placement:
    """Gives every rank its device(s) among this machine's `devices` (CPU cores or GPU numbers).

    A named device is taken as it is; the other ranks get what is left, in order. `spread` (CPU) hands all of the
    left devices out, several to a rank. `share` lets instances use one device together when there are too few, `crowd`
    (CPU) also ranks of one instance; without it that is a `PlanError`.
    """
    have = sorted(devices)
    replicas = plan.replicas()
    taken = {index for replica in replicas for index in _named(replica, have, node)}
    free = [index for index in have if index not in taken]
    wanted = [replica for replica in replicas if not replica.devices]
    needed = sum(replica.spec.num_ranks for replica in wanted)
    largest = max(wanted, key=lambda replica: replica.spec.num_ranks, default=None)
    pool = free or have  # every device is named: the others can only share
    too_large = largest is not None and largest.spec.num_ranks > len(pool) and not crowd
    if largest is not None and (too_large or (needed > len(free) and not share)):
        need = max(needed, largest.spec.num_ranks) if not share else largest.spec.num_ranks
        who = largest.name if share else "the plan"
        raise PlanError(
            f"{who} needs {need} devices but this machine has {len(pool)} for it: lower tp, pp or count, "
            "or serve on a machine with more"
        )
    each = max(1, len(free) // needed) if spread and needed else 1
    extra = len(free) - each * needed if spread and 0 < needed <= len(free) else 0
    ranks: dict[str, tuple[tuple[int, ...], ...]] = {}
    next_free = 0
    for replica in replicas:
        if replica.devices:
            ranks[replica.name] = tuple((index,) for index in _named(replica, have, node))
            continue
        mine = []
        for _ in range(replica.spec.num_ranks):
            size = each + (extra > 0)
            extra -= extra > 0
            mine.append(tuple(pool[(next_free + i) % len(pool)] for i in range(size)))
            next_free += size
        ranks[replica.name] = tuple(mine)
    return Placement(ranks, _shared(ranks))


def _named(replica: Replica, have: Sequence[int], node: str) -> list[int]:
    found = []
    for device in replica.devices:
        where, _, index = device.rpartition(":")
        if where != node:
            raise PlanError(
                f"{replica.name} is to run on {device}, but this machine is {node}: serve one node's devices"
            )
        if int(index) not in have:
            raise PlanError(f"{replica.name} is to run on {device}, but this machine has devices {_ranges(have)}")
        found.append(int(index))
    return found


def _shared(ranks: Mapping[str, tuple[tuple[int, ...], ...]]) -> tuple[str, ...]:
    users: dict[int, list[str]] = {}  # one name a rank
    for name, of_ranks in ranks.items():
        for rank in of_ranks:
            for index in rank:
                users.setdefault(index, []).append(name)
    return tuple(
        f"{_together(names)} share device {index}: each is slowed by the other's work"
        for index, names in sorted(users.items())
        if len(names) > 1
    )


def _together(names: Sequence[str]) -> str:
    """`prefill-0 and 2 ranks of decode-0`."""
    counts = {name: names.count(name) for name in names}
    return " and ".join(name if count == 1 else f"{count} ranks of {name}" for name, count in counts.items())


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 6` for [0, 1, 2, 3, 6]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)
