"""`serve --record-steps FOLDER`: what each step of an instance computed, when, and how long it took; never what anybody
said. A file for each instance, FOLDER/INSTANCE.csv, that goes on where an earlier one ended.

    began            seconds on this host's monotonic clock, the same in all of its processes
    seconds          that the device computed
    prompt_tokens    tokens of prompts, or pieces of them
    prompt_squares   the sum of (end^2 - start^2) over those pieces: what their attention costs
    sequences        that decode
    context          their tokens, the new ones too, together

What it is for: to see where a step's time went, and to tell a machine that is slower than its costs say from a plan
that is wrong (`distserve validate`). Knows no scheduler's mind.
"""

from __future__ import annotations

from pathlib import Path

from distserve.errors import UsageError
from distserve.sched.base import Batch, composition
from distserve.serve.rows import Later, Rows

HEADER = "began,seconds,prompt_tokens,prompt_squares,sequences,context\n"
LIMIT = 64 << 20  # bytes of a file: some million steps


class StepLog:
    """Of one instance."""

    def __init__(self, path: Path, *, later: Later, limit: int = LIMIT) -> None:
        """Raises `UsageError` where the file cannot be opened."""
        self._rows = Rows("--record-steps", path, HEADER, later=later, limit=limit)

    def note(self, batch: Batch, began: float, seconds: float) -> None:
        """A step is over; the scheduler has not been told yet."""
        tokens, squares, sequences, context = composition(batch.items)
        self._rows.add(f"{began:.6f},{seconds:.6f},{tokens},{squares},{sequences},{context}\n")

    def close(self) -> None:
        self._rows.close()


class Silent:
    """Nobody asked."""

    def note(self, batch: Batch, began: float, seconds: float) -> None: ...

    def close(self) -> None: ...


def folder(path: Path) -> None:
    """Makes it. Raises `UsageError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--record-steps {path}: no folder can be made there: {error.strerror}") from None


def step_log(folder: str | None, name: str, later: Later) -> StepLog | Silent:
    """Of the instance of this name. Raises `UsageError`."""
    return Silent() if folder is None else StepLog(Path(folder) / f"{name}.csv", later=later)
