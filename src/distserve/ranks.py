"""How the processes of an instance's ranks come to be: forks of the instance's own, or new interpreters (CUDA cannot be
forked). Each has the ends of two sockets: on the first it waits to be told which rank it is, what it then does is
`engine/worker.py`; the second is for moving KV between its device and the host's memory meanwhile.

    gateway -- fork server -- instance's process -- rank 0, rank 1, ...       each dies with the one before it
    profile ----------------- worker's process ---- rank 0, rank 1, ...

A fork has PyTorch already. It must come before its parent starts a thread or an event loop. Knows no engine: what a
rank does in its life it is handed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

Body = Callable[[socket.socket, socket.socket], int]  # a rank's life on its two ends; returns its exit status


class RankProcess:
    """A child of this process. `end`, `side`: this process's ends of the sockets to it."""

    def __init__(self, pid: int, end: socket.socket, side: socket.socket) -> None:
        self.pid = pid
        self.end = end
        self.side = side
        self._status: int | None = None

    def kill(self) -> None:
        if self._status is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """For its end; returns its exit status, negative: the signal that killed it. Idempotent."""
        if self._status is None:
            _, status = os.waitpid(self.pid, 0)
            self._status = os.waitstatus_to_exitcode(status)
        return self._status


def fork_ranks(count: int, body: Body) -> list[RankProcess] | int:
    """In this process: its new children. In a child: the exit status with which it is to leave, its life being over."""
    ranks: list[RankProcess] = []
    for _ in range(count):
        (end, their_end), (side, their_side) = socket.socketpair(), socket.socketpair()
        pid = os.fork()
        if pid == 0:
            for ours in (end, side, *(held for rank in ranks for held in (rank.end, rank.side))):
                ours.close()  # or a sibling would not see that its driver is gone
            die_with_parent()
            return body(their_end, their_side)
        their_end.close()
        their_side.close()
        ranks.append(RankProcess(pid, end, side))
    return ranks


def spawn_ranks(count: int, command: Sequence[str]) -> list[RankProcess]:
    """New interpreters that run `command` with the numbers of two files behind it, the ends of their sockets; it must
    come to `as_rank`."""
    ranks = []
    for _ in range(count):
        (end, their_end), (side, their_side) = socket.socketpair(), socket.socketpair()
        for theirs in (their_end, their_side):
            theirs.set_inheritable(True)  # no other file is: they are closed on the way
        whole = (*command, str(their_end.fileno()), str(their_side.fileno()))
        ranks.append(RankProcess(os.posix_spawn(whole[0], whole, os.environ), end, side))
        their_end.close()
        their_side.close()
    return ranks


def as_rank(end: str, side: str, body: Body) -> int:
    """In a new interpreter: its life."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # whoever started it ends it
    return body(socket.socket(fileno=int(end)), socket.socket(fileno=int(side)))


def end_ranks(ranks: list[RankProcess]) -> None:
    """A rank holds nothing that must be put in order."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait()


def die_with_parent() -> None:
    """Linux: should the parent be killed while this process cannot look at its line, the kernel ends it."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
