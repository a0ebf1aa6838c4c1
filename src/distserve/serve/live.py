"""A request as an instance knows it while it is there. Data only: what happens to it is `instance.py`."""

from __future__ import annotations

from dataclasses import dataclass

from distserve.request import Request
from distserve.sched.base import Sequence, State
from distserve.serve.messages import Name
from distserve.transfer.base import KVHandle

ATTEMPT_BITS = 8  # a sequence's id is the request's id and attempt in one integer: two attempts never collide here


@dataclass(slots=True)
class Live:
    """A request, and when what happened to it."""

    request: Request  # the gateway's; the executor has a copy under the sequence's id
    sequence: Sequence
    handle: KVHandle | None
    added: float
    started: float = 0.0  # first batch, or start of the pull
    pull: float = 0.0
    pull_bytes: int = 0
    ready: float = 0.0  # decode: end of the pull; else as `started`
    timed: bool = False  # its Timing has been sent

    @property
    def name(self) -> Name:
        return self.request.id, self.request.attempt

    @property
    def is_held(self) -> bool:
        """Its answer is out, and its KV waits."""
        return self.sequence.state is State.HELD


def key_of(name: Name) -> int:
    return name[0] << ATTEMPT_BITS | name[1]
