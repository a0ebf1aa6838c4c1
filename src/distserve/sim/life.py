"""A request in the simulator: what the world knows of it, and when what happened to it. No scheduler reads this."""

from __future__ import annotations

from dataclasses import dataclass

from distserve.metrics import OK, Record, tpot
from distserve.sched.base import Sequence

NEVER = float("inf")


@dataclass(slots=True, eq=False)
class Life:
    """One request, from its arrival to its last token. Times in seconds; NEVER: not yet."""

    index: int
    arrival: float
    prompt_tokens: int
    output_tokens: int  # it will have, which only the world knows
    app: str = ""
    started: float = NEVER  # its prompt's first batch
    first: float = NEVER  # first token
    pull_started: float = NEVER
    pulled: float = NEVER
    joined: float = NEVER  # first batch that decodes it after its first token
    last: float = NEVER  # last token
    status: str = OK

    def record(self) -> Record:
        """As a client sees it."""
        first = None if self.first == NEVER else self.first - self.arrival
        if self.last == NEVER:
            status = self.status if self.status != OK else "unfinished"
            return Record(self.arrival, self.prompt_tokens, self.output_tokens, first, None, status, self.app)
        pace = tpot(self.first, self.last, self.output_tokens)
        return Record(self.arrival, self.prompt_tokens, self.output_tokens, first, pace, OK, self.app)


class Imagined(Sequence):
    """A sequence whose end the world knows."""

    __slots__ = ("life", "target")

    def __init__(self, life: Life, num_tokens: int, num_kv_tokens: int = 0) -> None:
        super().__init__(life.index, num_tokens, num_kv_tokens=num_kv_tokens)
        self.life = life
        self.target = life.prompt_tokens + life.output_tokens  # tokens, when it is over
