"""The steps of a run: what each instance of the server computed, when, and how long it took, as `distserve serve
--record-steps` wrote them. Knows no prediction.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

COLUMNS = ("began", "seconds", "prompt_tokens", "prompt_squares", "sequences", "context")
FLUSHED = 1.5  # seconds after which a step is in its file for certain
_AT, _TOOK = 4, 5  # digits that are kept of times: a tenth of a millisecond, and a hundredth


class Step(NamedTuple):
    """See `serve/steplog.py`; `began` counts from the run's first arrival."""

    began: float
    seconds: float
    prompt_tokens: int
    prompt_squares: int
    sequences: int
    context: int


Steps = Mapping[str, Sequence[Step]]  # by instance, in the order in which they ended


class StepFiles:
    """A folder that a server on this host writes to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, int] = {}  # bytes, by file

    def since(self, start: float) -> dict[str, list[Step]]:
        """Whole lines that came since the last look, of steps that ended after `start` (monotonic clock)."""
        found = {}
        for path in sorted(self._folder.glob("*.csv")):
            offset = self._read.get(path.name, 0)
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read()
            data = data[: data.rfind(b"\n") + 1]
            self._read[path.name] = offset + len(data)
            rows = [row for row in csv.reader(data.decode("ascii").splitlines()) if row and row[0] != COLUMNS[0]]
            steps = [_step(row, start) for row in rows]
            found[path.stem] = [step for step in steps if step.began + step.seconds > 0]
        return found


def _step(row: Sequence[str], start: float) -> Step:
    began, seconds, tokens, squares, sequences, context = row
    return Step(float(began) - start, float(seconds), int(tokens), int(squares), int(sequences), int(context))


def to_columns(steps: Sequence[Step]) -> list[list[float]]:
    """For JSON: column by column, short."""
    at, took, *rest = zip(*steps, strict=True) if steps else [()] * len(COLUMNS)
    return [[round(x, _AT) for x in at], [round(x, _TOOK) for x in took], *map(list, rest)]


def from_columns(columns: Sequence[Sequence[Any]]) -> tuple[Step, ...]:
    """Raises `TypeError` or `ValueError`."""
    if len(columns) != len(COLUMNS):
        raise ValueError(f"{len(columns)} columns of steps, not {len(COLUMNS)}")
    return tuple(
        Step(float(began), float(took), *map(int, counts)) for began, took, *counts in zip(*columns, strict=True)
    )
