"""How the processes of an instance's ranks come to be: forks of the instance's own, or new interpreters (CUDA cannot be
forked). Each waits on one end of a socket to be told which rank it is; what it then does is `engine/worker.py`.

    gateway -- fork server -- instance's process -- rank 0, rank 1, ...       each dies with the one before it

A fork has PyTorch already. It must come before the instance's process starts a thread or an event loop.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

Body = Callable[[socket.socket], int]  # a rank's life on its end of the socket; returns its exit status

COMMAND = (sys.executable, "-m", "distserve.serve.launch", "rank")  # and the number of a file: its end of the socket


class RankProcess:
    """A child of this process. `end`: this process's end of the socket to it."""

    def __init__(self, pid: int, end: socket.socket) -> None:
        self.pid = pid
        self.end = end
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
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            for end in (ours, *(rank.end for rank in ranks)):
                end.close()  # or a sibling would not see that its driver is gone
            die_with_parent()
            return body(theirs)
        theirs.close()
        ranks.append(RankProcess(pid, ours))
    return ranks


def spawn_ranks(count: int) -> list[RankProcess]:
    """New interpreters, which run `as_rank`."""
    ranks = []
    for _ in range(count):
        ours, theirs = socket.socketpair()
        theirs.set_inheritable(True)  # the one file that is: all others are closed on the way
        command = (*COMMAND, str(theirs.fileno()))
        ranks.append(RankProcess(os.posix_spawn(command[0], command, os.environ), ours))
        theirs.close()
    return ranks


def as_rank(descriptor: str, body: Body) -> int:
    """In a new interpreter: its life."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # whoever started it ends it
    return body(socket.socket(fileno=int(descriptor)))


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
