"""A request in the simulator: what the world knows of it, and when what happened to it. No scheduler reads this."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from distserve.metrics import OK, Record, tpot
from distserve.sched.base import Sequence
from distserve.traces import Arrival

NEVER: Final = float("inf")


class Life:
    """One request, from its arrival to its last token. Times in seconds; NEVER: not yet.

    output_tokens   it will have, which only the world knows
    started         its prompt's first batch
    first, last     tokens
    """

    __slots__ = (
        "app",
        "arrival",
        "first",
        "index",
        "last",
        "output_tokens",
        "prompt_tokens",
        "pull_started",
        "pulled",
        "started",
        "status",
    )

    def __init__(self, index: int, arrival: float, prompt_tokens: int, output_tokens: int, app: str = "") -> None:
        self.index = index
        self.arrival = arrival
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.app = app
        self.started = self.first = self.pull_started = self.pulled = self.last = NEVER
        self.status = OK

    @property
    def tpot(self) -> float | None:
        """Of a life that is over."""
        return tpot(self.first, self.last, self.output_tokens)

    def record(self) -> Record:
        """As a client sees it."""
        first = None if self.first == NEVER else self.first - self.arrival
        if self.last == NEVER:
            status = self.status if self.status != OK else "unfinished"
            return Record(self.arrival, self.prompt_tokens, self.output_tokens, first, None, status, self.app)
        return Record(self.arrival, self.prompt_tokens, self.output_tokens, first, self.tpot, OK, self.app)


def lives_of(arrivals: Iterable[Arrival]) -> list[Life]:
    """That are about to begin."""
    lives: list[Life] = []
    for request in arrivals:
        life = Life(len(lives), request.arrival, request.prompt_tokens, request.output_tokens, request.app)
        lives.append(life)
    return lives


def lives_at(requests: list[Arrival], times: list[float], rate: float, number: int) -> list[Life]:
    """The first `number` of these requests, whose times are in units of 1 / rate."""
    lives: list[Life] = []
    for i in range(number):
        request = requests[i]
        lives.append(Life(i, times[i] / rate, request.prompt_tokens, request.output_tokens, request.app))
    return lives


class Imagined(Sequence):
    """A sequence whose end the world knows."""

    __slots__ = ("life", "target")

    def __init__(self, life: Life, num_tokens: int, num_kv_tokens: int = 0) -> None:
        super().__init__(life.index, num_tokens, 1, num_kv_tokens)
        self.life = life
        self.target = life.prompt_tokens + life.output_tokens  # tokens, when it is over

    def left(self) -> int:
        """Tokens it will still have."""
        return self.target - self.num_tokens
