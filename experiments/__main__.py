"""The paper's figures and tables, all or those that are named:

    python -m experiments [fig08 ...] [--quick] [--jobs N] [--out FOLDER]

Writes plots and tables to experiments/results and the document docs/guides/paper.md. `--out` writes somewhere else, and
then the document is not touched; `--quick` needs it: short runs, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.paper import page
from experiments.paper.lab import RESULTS, Lab


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments", description="The paper's figures and tables.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(page.EXPERIMENTS)} (none: all)")
    parser.add_argument("--quick", action="store_true", help="short runs; needs --out")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in page.EXPERIMENTS]
    if unknown:
        parser.error(f"there is no experiment {unknown[0]!r}: take of {', '.join(page.EXPERIMENTS)}")
    if given.jobs < 1:
        parser.error(f"--jobs {given.jobs}: at least 1")
    if given.quick and given.out == RESULTS:
        parser.error("--quick would overwrite the results: name a folder with --out")
    lab = Lab(given.out, given.jobs, given.quick)
    begun = time.perf_counter()
    for name in given.names or page.EXPERIMENTS:
        lab.keep(name, page.EXPERIMENTS[name].run(lab))
    if given.out == RESULTS:
        page.write(lab)
    print(f"done in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
