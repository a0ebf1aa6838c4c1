"""Copies of KV blocks and their digests, in C where a compiler is found, else in numpy: equal to the last bit, for the
two sides of a pull may be unlike machines. Knows no protocol: what a digest that differs means is for its callers.

The digest of `size` bytes is 64 bits, for finding damage, not forgery. A block is eight parts of size // 512 lines, a
line being eight 64-bit little-endian words; what is left, filled up with zeros to 512 bytes, is one more line of each
part. Each of the 64 words across the parts has a lane, which steps through its words in order:

    step(h, w) = mix(h ^ w)     mix(x) = (x ^ (x >> 32)) * FACTOR mod 2^64

The lanes begin as 1, 2, ... times FACTOR, and are then folded into the size by the same step. A step can be undone: so
what is confined to one word, any number of its bits, always changes the digest. Anything else goes unnoticed by chance
only, 2^-64; words that changed places are seen because a lane remembers the order, and lanes begin differently.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distserve.native import BuildError, build

log = logging.getLogger(__name__)

Bytes = NDArray[np.uint8]  # [num_blocks, block_bytes]
Digests = tuple[int, ...]

PARTS, WORDS = 8, 8
ROUND = PARTS * WORDS * 8  # bytes
FACTOR = np.uint64(0x9E3779B97F4A7C15)

_pointer, _int = ctypes.c_void_p, ctypes.c_int64


class Library:
    """The compiled form."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._digest, self._copy = library.ds_digest, library.ds_copy
        self._digest.argtypes, self._digest.restype = (_pointer, _int, _int, _pointer, _pointer), None
        self._copy.argtypes = (_pointer, _pointer, _pointer, _pointer, _int, _int, _pointer)
        self._copy.restype = None

    def digests(self, memory: Bytes, blocks: Sequence[int]) -> Digests:
        ids, found = _ids(memory, blocks), np.empty(len(blocks), np.uint64)
        self._digest(memory.ctypes.data, memory.shape[1], len(ids), ids.ctypes.data, found.ctypes.data)
        return tuple(found.tolist())

    def copy(self, memory: Bytes, blocks: Sequence[int], into: Bytes, targets: Sequence[int]) -> Digests:
        assert memory.shape[1] == into.shape[1]
        assert into.flags.writeable
        assert len(blocks) == len(targets)
        found = np.empty(len(blocks), np.uint64)
        from_ids, to_ids = _ids(memory, blocks), _ids(into, targets)
        parts = (memory.ctypes.data, from_ids.ctypes.data, into.ctypes.data, to_ids.ctypes.data)
        self._copy(*parts, memory.shape[1], len(from_ids), found.ctypes.data)
        return tuple(found.tolist())


class Reference:
    """The numpy form."""

    def digests(self, memory: Bytes, blocks: Sequence[int]) -> Digests:
        return digest_rows(memory[_ids(memory, blocks)])

    def copy(self, memory: Bytes, blocks: Sequence[int], into: Bytes, targets: Sequence[int]) -> Digests:
        to_ids = _ids(into, targets)
        into[to_ids] = memory[_ids(memory, blocks)]
        return digest_rows(into[to_ids])


@functools.cache
def load() -> Library | Reference:
    """What this process copies with; says once when it is the slower."""
    try:
        return Library(ctypes.CDLL(str(build(Path(__file__).parent, ["copying.c"]))))
    except (BuildError, OSError) as error:
        log.warning("KV is copied and checked by numpy (slower): %s", error)
        return Reference()


def digest_rows(rows: Bytes) -> Digests:
    """Of each row of [N, size]."""
    count, size = rows.shape
    whole = size // ROUND * ROUND
    lines = np.ascontiguousarray(rows[:, :whole]).view("<u8").reshape(count, PARTS, -1, WORDS)
    lanes = np.arange(1, PARTS * WORDS + 1, dtype=np.uint64).reshape(PARTS, WORDS) * FACTOR
    lanes = np.repeat(lanes[None], count, axis=0)
    for line in range(lines.shape[2]):
        lanes = _step(lanes, lines[:, :, line])
    if whole < size:
        last = np.zeros((count, ROUND), np.uint8)
        last[:, : size - whole] = rows[:, whole:]
        lanes = _step(lanes, last.view("<u8").reshape(count, PARTS, WORDS))
    found = np.full(count, size, np.uint64)
    for lane in lanes.reshape(count, -1).T:
        found = _step(found, lane)
    return tuple((found ^ (found >> np.uint64(32))).tolist())


def _step(lanes: NDArray[np.uint64], words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = lanes ^ words
    return (mixed ^ (mixed >> np.uint64(32))) * FACTOR


def _ids(memory: Bytes, blocks: Sequence[int]) -> NDArray[np.int64]:
    """Raises IndexError for a block that is not in `memory`."""
    assert memory.flags.c_contiguous
    ids = np.array(blocks, np.int64)
    if len(ids) and not 0 <= ids.min() <= ids.max() < len(memory):
        raise IndexError(f"blocks {ids.min()} to {ids.max()} of {len(memory)}")
    return ids


if __name__ == "__main__":  # builds ahead of the first use
    print(f"KV copies: ready ({'compiled' if isinstance(load(), Library) else 'numpy'})")
