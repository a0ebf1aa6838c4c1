"""Which part of a tensor a rank of a tensor-parallel group holds: arithmetic on shapes, no tensors and no processes.

A model file says of each checkpoint tensor how ranks share it (`Split`) and in how many indivisible units; the loader
turns that into slices and reads nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from distserve.errors import ModelError
from distserve.sharding import heads_fit, rank_heads


class Split(Enum):
    """How the ranks of a group share a weight [rows = output features, columns = input features]."""

    REPLICATED = "replicated"  # each holds all of it
    COLUMN = "column"  # each computes some output features: rows are divided
    ROW = "row"  # each takes some input features: columns are divided, results are summed
    VOCABULARY = "vocabulary"  # rows are divided, the last rank's part may be shorter
    KV_HEADS = "kv_heads"  # as COLUMN, but where ranks outnumber the heads several hold the same one


@dataclass(frozen=True, slots=True)
class Rank:
    """One place in a tensor-parallel group. The default is the only member of its group."""

    index: int = 0
    size: int = 1


ALONE = Rank()


def share(shape: tuple[int, ...], split: Split, units: int, rank: Rank) -> tuple[slice, ...]:
    """The slices of a tensor of `shape` that `rank` holds. `units`: how many equal groups the divided axis consists of
    (heads, features) and which stay whole. Raises `ModelError` where the group's size does not fit."""
    whole = [slice(0, n) for n in shape]
    if split is Split.REPLICATED:
        return tuple(whole)
    axis = 1 if split is Split.ROW else 0
    length = shape[axis]
    assert length % units == 0
    if split is Split.VOCABULARY:
        step = -(-units // rank.size)
        first, last = min(rank.index * step, units), min((rank.index + 1) * step, units)
    elif split is Split.KV_HEADS:
        if not heads_fit(units, rank.size):
            raise ModelError(f"tp={rank.size} does not fit {units} KV heads; take a multiple or a divisor of {units}")
        held = rank_heads(units, rank.size, rank.index)
        first, last = held.start, held.stop
    else:
        if units % rank.size:
            raise ModelError(f"tp={rank.size} does not divide the model's {units} heads or features; take a divisor")
        step = units // rank.size
        first, last = rank.index * step, (rank.index + 1) * step
    unit = length // units
    whole[axis] = slice(first * unit, last * unit)
    return tuple(whole)
