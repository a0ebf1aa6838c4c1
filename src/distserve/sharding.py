"""Which layers and KV heads of a model each rank of an instance holds, and which rank reads what from whom where two
instances differ. Integers only: the loader cuts weights by it, a pull reads by it, the simulator loads links by it.

Ranks are numbered in (pp, tp) order: rank = stage * tp + place in the stage. Heads are shared by the ranks of a stage:

    4 heads, tp = 2    |0 1|2 3|          in equal parts, in order
    2 heads, tp = 4    |0|0|1|1|          ranks that outnumber the heads hold one each, equally many the same
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from distserve.errors import PlanError


@dataclass(frozen=True, slots=True)
class Sharding:
    """What each rank of one instance holds. Stages may be of any lengths; `split_layers` gives the usual ones. Raises
    `PlanError` where the heads cannot be shared so."""

    num_kv_heads: int  # of the model
    stages: tuple[int, ...]  # layers of each pipeline stage
    tp: int = 1

    def __post_init__(self) -> None:
        if min(self.stages, default=0) < 1:
            raise PlanError(f"pipeline stages of {self.stages} layers: each needs at least one; take a lower pp")
        if not heads_fit(self.num_kv_heads, self.tp):
            raise PlanError(
                f"tp = {self.tp} does not fit {self.num_kv_heads} KV heads: take a divisor or a multiple of "
                f"{self.num_kv_heads}"
            )

    @property
    def pp(self) -> int:
        return len(self.stages)

    @property
    def num_ranks(self) -> int:
        return self.pp * self.tp

    @property
    def num_layers(self) -> int:
        return sum(self.stages)

    @property
    def copies(self) -> int:
        """Ranks of a stage that hold the same head."""
        return max(1, self.tp // self.num_kv_heads)

    def layers(self, rank: int) -> range:
        first = sum(self.stages[: rank // self.tp])
        return range(first, first + self.stages[rank // self.tp])

    def heads(self, rank: int) -> range:
        return rank_heads(self.num_kv_heads, self.tp, rank % self.tp)


class Part(NamedTuple):
    """Layers and KV heads that `target`, a rank of one instance, reads from `source`, a rank of another."""

    source: int
    target: int
    layers: range
    heads: range


def parts(source: Sharding, target: Sharding) -> Iterator[Part]:
    """All that the ranks of `target` read from those of `source`, target by target, by layers and then heads: together
    what each holds, nothing twice. Where several source ranks hold the same head, its readers take turns."""
    assert (source.num_kv_heads, source.num_layers) == (target.num_kv_heads, target.num_layers), "not the same model"
    first_ranks = [(rank, source.layers(rank)) for rank in range(0, source.num_ranks, source.tp)]  # of each stage
    for rank in range(target.num_ranks):
        wanted = target.layers(rank)
        stage, place = divmod(rank, target.tp)
        reader = stage * target.copies + place % target.copies  # among all readers of its heads, in whatever stage
        holders = list(_holders(source, target.heads(rank), reader))
        for first_rank, held in first_ranks:
            layers = range(max(held.start, wanted.start), min(held.stop, wanted.stop))
            if layers:
                for holder, heads in holders:
                    yield Part(first_rank + holder, rank, layers, heads)


def _holders(source: Sharding, wanted: range, reader: int) -> Iterator[tuple[int, range]]:
    """(place in a stage of `source`, heads to read there) for the `wanted` heads."""
    head = wanted.start
    while head < wanted.stop:
        holder = head * source.tp // source.num_kv_heads + reader % source.copies
        until = min(wanted.stop, source.heads(holder).stop)
        yield holder, range(head, until)
        head = until


def split_layers(num_layers: int, pp: int) -> tuple[int, ...]:
    """Layers of each stage; what pp does not divide goes to the first ones (the last computes the output head, too).
    Raises `PlanError` where there are fewer layers than stages."""
    if not 1 <= pp <= num_layers:
        raise PlanError(f"pp = {pp} stages for a model of {num_layers} layers: take 1 to {num_layers}")
    each, more = divmod(num_layers, pp)
    return tuple(each + (stage < more) for stage in range(pp))


def heads_fit(num_kv_heads: int, tp: int) -> bool:
    """Whether tp ranks share the heads in equal parts, or hold one each, all equally often."""
    return tp > 0 and (num_kv_heads % tp == 0 or tp % num_kv_heads == 0)


def rank_heads(num_kv_heads: int, tp: int, place: int) -> range:
    """The KV heads of one of a stage's `tp` ranks."""
    first = place * num_kv_heads // tp
    return range(first, max(first + 1, (place + 1) * num_kv_heads // tp))
