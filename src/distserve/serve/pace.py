"""How long a step should take, learned from the steps before it: the yardstick by which a hang is told from work.

Deliberately coarse and generous: a wrong alarm kills a healthy instance. The latency model that plans rely on is
another (`costs/`).
"""

from __future__ import annotations

FIRST = 30.0  # seconds; before anything has been measured
FLOOR = 2.0  # seconds; on a busy machine any step, and any sign of life, may take as long as this
SLACK = 4.0  # a step may take this many times the slowest pace seen lately
FIXED = 32  # tokens; a step costs about as much as this many tokens before its first one
FADE = 0.99  # a step: how fast a slow pace is forgotten


class Pace:
    """Remembers the slowest seconds-per-token of late."""

    def __init__(self) -> None:
        self._slowest = 0.0

    def record(self, num_tokens: int, seconds: float) -> None:
        self._slowest = max(self._slowest * FADE, seconds / (num_tokens + FIXED))

    def expected(self, num_tokens: int) -> float:
        """Seconds after which a step of `num_tokens` is suspicious."""
        if not self._slowest:
            return FIRST
        return max(FLOOR, SLACK * self._slowest * (num_tokens + FIXED))
