"""Copies of KV blocks and their digests, in C where a compiler is found, else in numpy: equal to the last bit, for the
two sides of a pull may be unlike machines. Knows no protocol: what a digest that differs means is for its callers.

A block's KV consists of units: one head's keys, or values, of one layer. Every unit has a place, its number in the
whole model, and the digest of a block is the sum mod 2^64 of its units' digests, whichever rank holds them and in
whatever order: so it does not change when the block is shared among ranks in another way.

The digest of a unit is 64 bits, for finding damage, not forgery. A unit is lines of eight 64-bit little-endian words,
the last filled up with zeros. Each of the eight words of a line has a lane, which steps through its words in order:

    step(h, w) = mix(h ^ w)     mix(x) = (x ^ (x >> 32)) * FACTOR mod 2^64

The lanes begin as 1, 2, ... times FACTOR, each XOR a seed that is drawn from the unit's place. At the end they step
together, 0 to 3 with 4 to 7, then 0 and 1 with 2 and 3, 0 with 1, and that one with the unit's size; the result is
scattered (the finalizer of splitmix64) before it is added. All of this can be undone as long as the rest is known: so
what is confined to one word, any number of its bits, always changes the digest. Anything else goes unnoticed by chance
only, 2^-64: words that changed places are seen because a lane remembers the order and lanes begin differently, units
that changed places because they begin differently, too.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distserve.native import BuildError, build

log = logging.getLogger(__name__)

Bytes = NDArray[np.uint8]  # [num_blocks, block_bytes]
Sums = NDArray[np.uint64]  # [number of blocks asked for]: of the digests of the units that were copied, or read

WORDS = 8
LINE = WORDS * 8  # bytes
FACTOR = np.uint64(0x9E3779B97F4A7C15)

_pointer, _int = ctypes.c_void_p, ctypes.c_int64


class Units(NamedTuple):
    """Which units of each block are meant."""

    size: int  # bytes of a unit
    table: NDArray[np.int64]  # [N, 3]: offset in the source's block, offset in the target's block, bits of the seed

    @classmethod
    def of(cls, size: int, moves: Sequence[tuple[int, int, int]]) -> Units:
        """`moves`: of each unit its offset in the source's block, in the target's block, and its place."""
        table = np.array(moves, np.int64).reshape(len(moves), 3)
        table[:, 2] = _scatter((table[:, 2] + 1).view(np.uint64) * FACTOR).view(np.int64)
        return cls(size, table)

    @property
    def bytes(self) -> int:
        """Of a block."""
        return self.size * len(self.table)


class Library:
    """The compiled form."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._digest, self._copy = library.ds_digest, library.ds_copy
        units = (_pointer, _int, _int, _pointer)
        self._digest.argtypes, self._digest.restype = (_pointer, _int, _pointer, _int, *units), None
        self._copy.argtypes = (_pointer, _int, _pointer, _pointer, _int, _pointer, _int, *units)
        self._copy.restype = None

    def digests(self, memory: Bytes, blocks: Sequence[int], units: Units) -> Sums:
        ids, table = _ids(memory, blocks), _table(units, memory)
        found = np.zeros(len(ids), np.uint64)
        parts = (memory.ctypes.data, memory.shape[1], ids.ctypes.data, len(ids))
        self._digest(*parts, table.ctypes.data, len(table), units.size, found.ctypes.data)
        return found

    def copy(self, memory: Bytes, blocks: Sequence[int], into: Bytes, targets: Sequence[int], units: Units) -> Sums:
        assert into.flags.writeable
        assert len(blocks) == len(targets)
        from_ids, to_ids, table = _ids(memory, blocks), _ids(into, targets), _table(units, memory, into)
        found = np.zeros(len(from_ids), np.uint64)
        there = (memory.ctypes.data, memory.shape[1], from_ids.ctypes.data)
        here = (into.ctypes.data, into.shape[1], to_ids.ctypes.data, len(to_ids))
        self._copy(*there, *here, table.ctypes.data, len(table), units.size, found.ctypes.data)
        return found


class Reference:
    """The numpy form."""

    def digests(self, memory: Bytes, blocks: Sequence[int], units: Units) -> Sums:
        ids = _ids(memory, blocks)
        found = np.zeros(len(ids), np.uint64)
        for offset, _, seed in _table(units, memory).tolist():
            found += _digest_rows(memory[ids, offset : offset + units.size], seed)
        return found

    def copy(self, memory: Bytes, blocks: Sequence[int], into: Bytes, targets: Sequence[int], units: Units) -> Sums:
        from_ids, to_ids = _ids(memory, blocks), _ids(into, targets)
        found = np.zeros(len(from_ids), np.uint64)
        for offset, to, seed in _table(units, memory, into).tolist():
            into[to_ids, to : to + units.size] = memory[from_ids, offset : offset + units.size]
            found += _digest_rows(into[to_ids, to : to + units.size], seed)
        return found


@functools.cache
def load() -> Library | Reference:
    """What this process copies with; says once when it is the slower."""
    try:
        return Library(ctypes.CDLL(str(build(Path(__file__).parent, ["copying.c"]))))
    except (BuildError, OSError) as error:
        log.warning("KV is copied and checked by numpy (slower): %s", error)
        return Reference()


def _digest_rows(rows: Bytes, seed: int) -> Sums:
    """Of each row of [N, size], a unit."""
    count, size = rows.shape
    padded = np.zeros((count, -(-size // LINE) * LINE), np.uint8)
    padded[:, :size] = rows
    first = (np.arange(1, WORDS + 1, dtype=np.uint64) * FACTOR) ^ np.int64(seed).view(np.uint64)
    lanes = np.repeat(first[None], count, axis=0)  # [N, WORDS]
    for line in padded.view("<u8").reshape(count, padded.shape[1] // LINE, WORDS).swapaxes(0, 1):
        lanes = _step(lanes, line)
    while half := lanes.shape[1] // 2:
        lanes = _step(lanes[:, :half], lanes[:, half:])
    return _scatter(_step(lanes[:, 0], np.full(count, size, np.uint64)))


def _step(lanes: Sums, words: Sums) -> Sums:
    mixed = lanes ^ words
    return (mixed ^ (mixed >> np.uint64(32))) * FACTOR


def _scatter(x: Sums) -> Sums:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _ids(memory: Bytes, blocks: Sequence[int]) -> NDArray[np.int64]:
    """Raises IndexError for a block that is not in `memory`."""
    assert memory.flags.c_contiguous
    ids = np.array(blocks, np.int64)
    if len(ids) and not 0 <= ids.min() <= ids.max() < len(memory):
        raise IndexError(f"blocks {ids.min()} to {ids.max()} of {len(memory)}")
    return ids


def _table(units: Units, memory: Bytes, into: Bytes | None = None) -> NDArray[np.int64]:
    """The units' table, all inside the blocks."""
    table = units.table
    assert table.dtype == np.int64
    assert table.flags.c_contiguous
    if len(table):
        assert 0 <= table[:, 0].min() <= table[:, 0].max() <= memory.shape[1] - units.size
        assert into is None or 0 <= table[:, 1].min() <= table[:, 1].max() <= into.shape[1] - units.size
    return table


if __name__ == "__main__":  # builds ahead of the first use
    print(f"KV copies: ready ({'compiled' if isinstance(load(), Library) else 'numpy'})")
