"""Engines that keep the KV of preempted sequences in host memory: what comes back, and what is then left to compute.
Knows no instance."""

from __future__ import annotations

from distserve.sched.base import Item, Sequence
from distserve.sim.flight import known
from distserve.sim.life import NEVER


def swapped(others: list[Item]) -> int:
    """Tokens whose KV is brought back for a step."""
    tokens = 0
    for sequence, n in others:
        if n > 1 and known(sequence).life.first != NEVER:
            tokens += n
    return tokens


def kept(others: list[Item]) -> list[Item]:
    """The items as such an engine sees them."""
    items: list[Item] = []
    for sequence, n in others:
        if n > 1 and known(sequence).life.first != NEVER:
            computed = sequence.num_computed + n - 1
            items.append((Sequence(sequence.id, sequence.num_tokens, num_computed=computed), 1))
        else:
            items.append((sequence, n))
    return items
