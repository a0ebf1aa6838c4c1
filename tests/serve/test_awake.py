"""Cores are kept awake while there is traffic, by somebody who is in nobody's way, and not for ever."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator

import pytest

from distserve.serve.awake import Vigil

CORE = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this system has no priority below all others")


@pytest.fixture
def vigil() -> Iterator[Vigil]:
    found = Vigil([CORE], 2.0)
    yield found
    found.close()


def changed(pid: int, how: int) -> int:
    """Waits until the child has stopped, or goes on."""
    result = os.waitid(os.P_PID, pid, how)
    assert result is not None
    return result.si_pid


def test_a_watcher_spins_while_there_is_work_and_stops_a_while_after_it(vigil: Vigil) -> None:
    (pid,) = vigil.pids
    assert changed(pid, os.WSTOPPED) == pid  # it begins by waiting to be told
    assert os.sched_getscheduler(pid) == os.SCHED_IDLE
    assert os.sched_getaffinity(pid) == {CORE}
    vigil.beat(0.0)
    assert changed(pid, os.WCONTINUED) == pid
    vigil.beat(1.9)
    vigil.beat(2.1)
    assert changed(pid, os.WSTOPPED) == pid


def test_it_ends_with_the_instance() -> None:
    """Also where that is killed and can tell nobody."""
    says = "import os, sys; from distserve.serve.awake import Vigil; v = Vigil([int(sys.argv[1])], 1.0); print(*v.pids)"
    waits = "; os.waitid(os.P_PID, v.pids[0], os.WSTOPPED); print('ready', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", says + waits, str(CORE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as instance:
        assert instance.stdout is not None
        pid = int(instance.stdout.readline())
        assert instance.stdout.readline() == "ready\n"
        watcher = os.pidfd_open(pid)
        instance.kill()
        assert select.select([watcher], [], [], 20.0)[0], "the watcher outlives its instance"
        os.close(watcher)


def test_nobody_watches_where_cores_may_sleep() -> None:
    assert Vigil([CORE], 0.0).pids == []
    assert Vigil([], 2.0).pids == []
