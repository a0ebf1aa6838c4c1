"""What else the machine did during a run: processor time that neither the server nor this client used, and time that
the machine's own host took away. Linux; elsewhere nothing is known. Knows no server but its session."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
# Fields of the first line of /proc/stat, behind its name: what counts as work, and what the host took.
_WORK, _STOLEN = (0, 1, 2, 5, 6), 7


@dataclass(frozen=True, slots=True)
class Clocks:
    """A look at the clocks, in seconds of processor time of all cores."""

    at: float  # wall clock
    work: float
    stolen: float
    ours: float  # of the server and this process


def look(session: int | None) -> Clocks | None:
    """`session`: that of the server's processes, of which it is the first; None: a server that is not ours, whose share
    cannot be told from that of others. None where the system does not say."""
    if session is None:
        return None
    try:
        fields = [int(value) for value in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]]
    except (OSError, ValueError):
        return None
    ours = time.process_time() + _of_session(session)
    return Clocks(time.monotonic(), sum(fields[i] for i in _WORK) / _TICK, fields[_STOLEN] / _TICK, ours)


def _of_session(session: int) -> float:
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICK


def between(before: Clocks | None, after: Clocks | None) -> dict[str, float]:
    """Cores that others used, and that the host took, on average; {} where nothing is known."""
    if before is None or after is None:
        return {}
    seconds = after.at - before.at
    others = (after.work - before.work) - (after.ours - before.ours)
    return {"others": max(0.0, others / seconds), "stolen": (after.stolen - before.stolen) / seconds}
