"""Which steps to time: a coarse grid over what an instance will meet, and where to look closer. Knows no clock: values
in, points out.

Prompts: lengths alone up to the longest, and equal ones together up to twice the knee, for longer batches are not made.
Decoding: batches up to the largest, at short, middle and long contexts, as far as the KV reaches.

Kernels like numbers of rows that are round; prompts are as long as they are. So among the numbers are odd ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from distserve.costs.fit import FEWEST
from distserve.knee import SIZES

Lengths = tuple[int, ...]  # of the prompts of a step
Cell = tuple[int, int]  # sequences that decode, tokens of context of each
Mixture = tuple[int, int, int, int]  # tokens computed already, to compute; and a cell
Point = TypeVar("Point", Lengths, Cell)

SHORTEST = 16  # tokens of the shortest prompt and context that are timed
BATCHES = (1, 4, 8, 16, 32, 36, 64, 128, 256)
CONTEXTS = (32, 128, 400, 1100, 4096)
ODD = (24, 45, 90, 181, 362, 724, 1448)  # tokens, half way between `knee.SIZES` in proportion
_SHORTER = 0.9  # than equal parts of a round number are prompts together
TOGETHER = (2, 4, 8, 16)  # equal prompts in a step
_CLOSE = 1.3  # no point between two that are so near: times


@dataclass(frozen=True, slots=True)
class Range:
    """What an instance can meet."""

    longest_prompt: int  # tokens
    longest_context: int
    kv_tokens: int  # that the KV memory holds
    largest_batch: int  # sequences that decode together
    block_size: int = 16  # tokens

    def room(self, sequences: int) -> int:
        """Tokens that each of so many sequences can have, in blocks of its own."""
        return self.kv_tokens // self.block_size // sequences * self.block_size


def prompts(within: Range, knee: int) -> list[Lengths]:
    """The coarse grid of prompts."""
    longest = min(within.longest_prompt, within.room(1))
    alone = sorted({n for n in (SHORTEST, *SIZES, *ODD) if n < longest} | {longest})
    found: list[Lengths] = [(n,) for n in alone]
    for number in TOGETHER:
        most = min(longest, within.room(number))
        equal = [round(_SHORTER * total / number) for total in SIZES if total <= 2 * knee]
        lengths = [n for n in equal if SHORTEST // 2 <= n <= most]
        if len(lengths) >= FEWEST:  # else what is between and beyond them would be a guess
            found += [(n,) * number for n in lengths]
    return found


def decodes(within: Range) -> list[Cell]:
    """The coarse grid of decode steps."""
    found: list[Cell] = []
    for batch in (*[b for b in BATCHES if b < within.largest_batch], within.largest_batch):
        most = min(within.longest_context, within.room(batch) - SHORTEST)
        if most < SHORTEST:
            break
        contexts = [n for n in CONTEXTS if n * _CLOSE < most]
        found += [(batch, n) for n in (*contexts, most)]
    return found


def closer_prompts(errors: Mapping[Lengths, float]) -> list[Lengths]:
    """Points beside the one that the others predict worst (`errors`: by point), towards its neighbours of as many
    prompts."""
    worst = max(errors, key=lambda point: errors[point])
    row = sorted(point[0] for point in errors if len(point) == len(worst))
    return [(n,) * len(worst) for n in _between(row, worst[0])]


def closer_decodes(errors: Mapping[Cell, float]) -> list[Cell]:
    """The same of decode steps: towards its neighbours in context, and in batch size at its context or the longest that
    the larger of them was timed at."""
    batch, context = max(errors, key=lambda cell: errors[cell])
    found = [(batch, c) for c in _between(sorted(c for b, c in errors if b == batch), context)]
    batches = sorted({b for b, _ in errors})
    for other in _between(batches, batch):
        larger = next(b for b in batches if b >= other)
        found.append((other, min(context, max(c for b, c in errors if b == larger))))
    return found


def _between(row: Sequence[int], value: int) -> Iterable[int]:
    """Half way, in proportion, from `value` to its neighbours of the row, where there is room."""
    for low, high in pairwise(row):
        if value in (low, high) and high > _CLOSE * low and high - low > 1:
            yield round((low * high) ** 0.5)


def mixed(within: Range, knee: int) -> list[Mixture]:
    """Pieces of prompts beside sequences that decode, as a colocated instance computes them."""
    found: list[Mixture] = []
    for batch, context in ((4, 256), (16, 256), (48, 256)):
        batch = min(batch, within.largest_batch)
        for computed in (0, 2 * knee):
            new = max(1, knee - batch)
            fits = computed + new <= within.longest_prompt and context <= within.longest_context
            if fits and max(computed + new, context) <= within.room(batch + -(-(computed + new) // context)):
                found.append((computed, new, batch, context))
    return list(dict.fromkeys(found))


def typical_decode(within: Range) -> Cell:
    """A batch in the middle of what is met."""
    batch = min(16, within.largest_batch)
    return batch, max(SHORTEST, min(256, within.longest_context, within.room(batch) - SHORTEST))


def probes(within: Range) -> tuple[int, int]:
    """Tokens of a short prompt and of a long one."""
    return SHORTEST, max(SHORTEST + 1, min(1024, within.longest_prompt // 2))
