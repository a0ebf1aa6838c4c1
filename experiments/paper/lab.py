"""Where experiments run: a pool of processes, progress on stderr, and the files that are kept. Knows no figure.

results/<name>.json   what the document is made of
results/<name>*.csv   its tables in full
results/<name>*.svg   its drawings
"""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure

from experiments.paper.plots import save

RESULTS = Path(__file__).parent.parent / "results"
Result = TypeVar("Result")
Cell = str | float | int | None


@dataclass(frozen=True)
class Lab:
    """`quick`: short runs at few rates, for tests; their figures mean nothing."""

    out: Path = RESULTS
    jobs: int = 1
    quick: bool = False

    def map(self, what: str, work: Callable[..., Result], arguments: Sequence[tuple[Any, ...]]) -> list[Result]:
        """`work` with each of the arguments, in other processes; results in order."""
        begun = time.perf_counter()
        found: dict[int, Result] = {}
        if self.jobs == 1:
            for at, given in enumerate(arguments):
                found[at] = work(*given)
                self._progress(what, len(found), len(arguments), begun)
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(self.jobs, mp_context=context) as pool:
                places = {pool.submit(work, *given): at for at, given in enumerate(arguments)}
                for future in as_completed(places):
                    found[places[future]] = future.result()
                    self._progress(what, len(found), len(arguments), begun)
        return [found[at] for at in range(len(arguments))]

    def _progress(self, what: str, done: int, of: int, begun: float) -> None:
        end = "\n" if done == of else ""
        print(f"\r{what}: {done} of {of} in {time.perf_counter() - begun:.0f} s ", end=end, file=sys.stderr, flush=True)

    def table(self, name: str, head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(head)
            writer.writerows([_cell(value) for value in row] for row in rows)

    def draw(self, name: str, figure: Figure) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        save(figure, self.out / f"{name}.svg")

    def keep(self, name: str, found: dict[str, Any]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_plain(found), indent=1, allow_nan=False)
        (self.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")

    def kept(self, name: str) -> dict[str, Any] | None:
        """What was kept by that name; None: it was not run yet."""
        path = self.out / f"{name}.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found


def _cell(value: Cell) -> str | int:
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else ""
    return "" if value is None else value


def _plain(value: Any) -> Any:
    """JSON without infinities (null) and with five digits, so that files differ only where results do."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
