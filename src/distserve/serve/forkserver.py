"""The process that loads the weights once and forks an instance for each configuration it is given, a line each.

    line 1: load what it asks for, fork      line n: fork      end of input: leave; the forks are killed by the kernel

Single-threaded until the fork, always: a thread would be lost in the child with whatever it holds. It answers in lines
of JSON (`spawn.Report`) on its standard output.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
from collections.abc import Callable

from distserve.errors import UsageError
from distserve.serve.config import InstanceConfig, decode_config
from distserve.serve.spawn import EndedReport, FatalReport, ForkedReport, LoadingReport, Report, encode_report

Preload = Callable[[InstanceConfig, Callable[[float, str], None]], None]
Live = Callable[[InstanceConfig], int]


def _say(report: Report) -> None:
    os.write(sys.stdout.fileno(), encode_report(report) + b"\n")


def main(preload: Preload, live: Live) -> int:
    """`preload(config, progress)` once, then `live(config)` in each fork. Returns the exit status; in a fork, its."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the gateway drains first, then ends our input
    forks: dict[int, int] = {}  # file descriptor of the process -> its id
    poll = select.poll()
    poll.register(0, select.POLLIN)
    pending = b""
    loaded = False
    while True:
        for descriptor, _ in poll.poll():
            if descriptor in forks:
                poll.unregister(descriptor)
                _bury(descriptor, forks.pop(descriptor))
                continue
            data = os.read(0, 1 << 16)
            if not data:
                return 0
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                config = decode_config(line)
                if not loaded:
                    if not _load(preload, config):
                        return 2
                    loaded = True
                pid = os.fork()
                if pid == 0:
                    return _be_child(live, config, list(forks))
                descriptor = os.pidfd_open(pid)
                forks[descriptor] = pid
                poll.register(descriptor, select.POLLIN)
                _say(ForkedReport(config.epoch, pid))


def _load(preload: Preload, config: InstanceConfig) -> bool:
    try:
        preload(config, lambda fraction, what: _say(LoadingReport(fraction, what)))
    except UsageError as error:
        _say(FatalReport(str(error), usage=True))
        return False
    gc.collect()
    gc.freeze()  # what is here now is never collected: a collection in a fork would copy the pages it marks
    return True


def _be_child(live: Live, config: InstanceConfig, siblings: list[int]) -> int:
    """Lets go of the server's pipes, which are not this process's business, and becomes the instance."""
    for descriptor in siblings:
        os.close(descriptor)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.close(nothing)
    return live(config)


def _bury(descriptor: int, pid: int) -> None:
    os.close(descriptor)
    _, status = os.waitpid(pid, 0)
    _say(EndedReport(pid, os.waitstatus_to_exitcode(status)))
