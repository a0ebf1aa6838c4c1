"""Keeps the cores of an instance on a CPU awake between its steps, and for a while after the last one.

The host of a virtual machine lends a core that idles to others, and who wants it back shares it with them at first:
prompts that come one by one take longer than those that follow each other (docs/measurements.md). So a process of the
lowest priority (SCHED_IDLE: whoever has work goes before it at once) spins on each core while there is traffic. It ends
with the instance's process.

    idle --work--> awake --`linger` seconds without work--> idle (the process is stopped, the core sleeps)

`python -m distserve.serve.awake CORE` is that process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable

from distserve.ranks import die_with_parent


class Vigil:
    """Over `cores`; none where the system has no such priority, or `linger` is 0."""

    def __init__(self, cores: Iterable[int], linger: float) -> None:
        self._linger = linger
        watched = list(cores) if linger and hasattr(os, "SCHED_IDLE") else []
        self._watchers = [
            subprocess.Popen([sys.executable, "-m", "distserve.serve.awake", str(core)], stdin=subprocess.DEVNULL)
            for core in watched
        ]
        self._awake = False

    @property
    def pids(self) -> list[int]:
        return [watcher.pid for watcher in self._watchers]

    def beat(self, idle: float) -> None:
        """To be called now and then; `idle`: seconds since there was work."""
        awake = idle < self._linger
        if awake:  # said again and again: a watcher that has just begun stops itself once
            self._tell(signal.SIGCONT)
        elif self._awake:
            self._tell(signal.SIGSTOP)
        self._awake = awake

    def close(self) -> None:
        self._tell(signal.SIGKILL)
        for watcher in self._watchers:
            watcher.wait()
        self._watchers = []

    def _tell(self, number: signal.Signals) -> None:
        for watcher in self._watchers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(watcher.pid, number)


def main(core: int) -> None:
    """Spins on it, whenever nobody else wants it and it was told to."""
    for unwanted in (signal.SIGINT, signal.SIGTERM):
        signal.signal(unwanted, signal.SIG_IGN)
    die_with_parent()
    os.sched_setaffinity(0, (core,))
    os.nice(19)
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        pass


if __name__ == "__main__":
    main(int(sys.argv[1]))
