"""Which bytes of which rank: what each rank of a pulling instance reads from each rank of the one that computed the KV,
whatever tp and pp either has. Arithmetic only: no memory, no process, no clock.

A rank lays out the KV of its own layers and heads, block-major: `[block][layer][k|v][head][token][dim]`. So one head's
keys (or values) of one layer lie together in a block, and what two ranks have in common is

    all heads of both       one range: the common layers follow each other on both sides
    some heads of either    two ranges a layer, the keys and the values of those heads

which is as few as there can be: what lies between two ranges belongs to another rank on one side or the other. Between
equal layouts each rank reads whole blocks from its like. The ranges hold for every block, for both sides number the
tokens of a request alike: block sizes that differ are refused, as are other models and other dtypes.

What ranges consist of are units, one head's keys or values of one layer: the least that is read, and what digests are
taken of (`copying.py`), for a unit lies together on whatever rank holds it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from distserve.errors import PlanError
from distserve.sharding import Part, Sharding, parts, split_layers
from distserve.specs import DTYPE_BYTES, KVLayout


@dataclass(frozen=True, slots=True)
class InstanceLayout:
    """How the ranks of one instance lay out a model's KV."""

    sharding: Sharding
    head_dim: int
    block_size: int  # tokens
    dtype: str  # a key of specs.DTYPE_BYTES

    @classmethod
    def of(cls, model: KVLayout, tp: int = 1, pp: int = 1) -> InstanceLayout:
        """Of an instance that shares `model`, the KV of all layers and heads, among tp * pp ranks. Raises `PlanError`
        where they do not fit."""
        return cls(
            Sharding(model.num_kv_heads, split_layers(model.num_layers, pp), tp),
            model.head_dim,
            model.block_size,
            model.dtype,
        )

    def of_rank(self, rank: int) -> KVLayout:
        """What one rank's blocks hold."""
        layers, heads = self.sharding.layers(rank), self.sharding.heads(rank)
        return KVLayout(len(layers), len(heads), self.head_dim, self.block_size, self.dtype)

    @property
    def unit_bytes(self) -> int:
        """One head's keys (or values) of one layer, of the tokens of a block."""
        return self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    def places(self, rank: int) -> list[int]:
        """Of each unit of a rank's block, in order: its number in the whole model, [layer][k|v][head]."""
        heads, total = self.sharding.heads(rank), self.sharding.num_kv_heads
        halves = range(2 * self.sharding.layers(rank).start, 2 * self.sharding.layers(rank).stop)
        return [half * total + head for half in halves for head in heads]


class Range(NamedTuple):
    """Bytes that lie together in a block on both sides."""

    source: int  # offset in the source rank's block
    target: int  # offset in the target rank's block
    size: int


@dataclass(frozen=True, slots=True)
class Read:
    """What a target rank reads from one source rank, of every block."""

    source: int  # rank
    ranges: tuple[Range, ...]  # ascending on both sides

    @property
    def size(self) -> int:
        """Bytes a block."""
        return sum(found.size for found in self.ranges)


@functools.cache
def reads(source: InstanceLayout, target: InstanceLayout) -> tuple[tuple[Read, ...], ...]:
    """What each rank of `target` (the index) reads from ranks of `source`: every byte of its block once. Computed once
    for a pair. Raises `PlanError` where the two do not hold the same model's KV in blocks of the same size."""
    _refuse(source, target)
    found: list[list[Read]] = [[] for _ in range(target.sharding.num_ranks)]
    for part in parts(source.sharding, target.sharding):
        found[part.target].append(Read(part.source, tuple(_ranges(part, source, target))))
    return tuple(map(tuple, found))


def _ranges(part: Part, source: InstanceLayout, target: InstanceLayout) -> Iterator[Range]:
    """In units of one head's keys (or values) of one layer, turned into bytes."""
    heads, first = len(part.heads), part.layers.start
    from_heads, to_heads = source.sharding.heads(part.source), target.sharding.heads(part.target)
    from_layer = first - source.sharding.layers(part.source).start
    to_layer = first - target.sharding.layers(part.target).start
    unit = target.unit_bytes
    if len(from_heads) == len(to_heads) == heads:
        layer = 2 * heads * unit
        yield Range(from_layer * layer, to_layer * layer, len(part.layers) * layer)
        return
    from_head, to_head = part.heads.start - from_heads.start, part.heads.start - to_heads.start
    for half in range(2 * len(part.layers)):  # keys of the first layer, its values, keys of the next, ...
        from_half, to_half = 2 * from_layer + half, 2 * to_layer + half
        yield Range(
            (from_half * len(from_heads) + from_head) * unit, (to_half * len(to_heads) + to_head) * unit, heads * unit
        )


def _refuse(source: InstanceLayout, target: InstanceLayout) -> None:
    def values(layout: InstanceLayout) -> dict[str, object]:
        return {
            "layers": layout.sharding.num_layers,
            "KV heads": layout.sharding.num_kv_heads,
            "head_dim": layout.head_dim,
            "block_size": layout.block_size,
            "dtype": layout.dtype,
        }

    theirs, ours = values(source), values(target)
    unlike = [f"{name} {theirs[name]} and {ours[name]}" for name in ours if theirs[name] != ours[name]]
    if unlike:
        raise PlanError(
            f"KV cannot be pulled between instances of {', '.join(unlike)}: give both the same model, dtype and block "
            "size"
        )
