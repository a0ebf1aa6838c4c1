"""Memory that NIXL writes to, and the only such memory: what a pull reads lands here and is copied from here.

A read that was given up (its source was fenced, or does not answer) may still arrive when its blocks have long become
another request's. So a pull takes a landing, and it is given out again when all reads into it are over.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from distserve.errors import PullError
from distserve.transfer.agent import Agent, Pieces, Read
from distserve.transfer.memory import SharedMemory


class Landing:
    """Memory of one pull: two halves, one to read into while the other is copied."""

    def __init__(self, agent: Agent, size: int) -> None:
        self._agent = agent
        memory = SharedMemory(2 * size)  # for its large pages
        memory.touch(memory.size)
        self.memory = np.frombuffer(memory.buffer, np.uint8).reshape(2, size)
        memory.close()  # the array keeps it
        self.address = agent.register(self.memory.reshape(-1))
        self.size = size  # of a half
        self.source = ""  # name of the agent that the reads are of
        self.reads: list[Read] = []  # that may be under way

    def read(self, pieces: Pieces) -> Read:
        """Begins to read from the source. Raises `PullError`."""
        read = self._agent.read(self.source, pieces)
        self.reads.append(read)
        return read

    def split(self, half: int, sizes: Sequence[int]) -> tuple[list[memoryview], list[int]]:
        """Parts of these sizes, and their addresses."""
        ends = np.cumsum(sizes).tolist()
        parts = [self.memory[half, end - size : end].data for end, size in zip(ends, sizes, strict=True)]
        return parts, [self.address + half * self.size + end - size for end, size in zip(ends, sizes, strict=True)]


class Landings:
    """Gives landings out, and forgets sources (by their agents' names), when nothing that concerns them can arrive."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._lock = threading.Lock()
        self._taken: set[Landing] = set()
        self._left: list[Landing] = []
        self._leaving: list[str] = []

    def take(self, source: str, size: int) -> Landing:
        with self._lock:
            self._settle()
            free = [landing for landing in self._left if not landing.reads]
            found = next((landing for landing in free if landing.size >= size), None)
            if found is None and free:  # a source with larger blocks has come
                self._left.remove(free[0])
                self._agent.deregister(free[0].address)
            if found is None:
                found = Landing(self._agent, size)
            else:
                self._left.remove(found)
            found.source = source
            self._taken.add(found)
            return found

    def leave(self, landing: Landing) -> None:
        with self._lock:
            self._taken.remove(landing)
            self._left.append(landing)
            self._settle()

    def forget(self, source: str) -> None:
        with self._lock:
            self._leaving.append(source)
            self._settle()

    def is_leaving(self, source: str) -> bool:
        """It is to be forgotten and cannot be yet: to meet it again now would be to meet what was cut off."""
        with self._lock:
            self._settle()
            return source in self._leaving

    def _settle(self) -> None:
        for landing in self._left:
            landing.reads = [read for read in landing.reads if not self._over(read)]
        busy = [landing.source for landing in (*self._taken, *(left for left in self._left if left.reads))]
        for source in [leaving for leaving in self._leaving if leaving not in busy]:
            self._leaving.remove(source)
            self._agent.forget(source)

    def _over(self, read: Read) -> bool:
        try:
            return self._agent.done(read)
        except PullError:  # whoever wanted it gave up
            return True
