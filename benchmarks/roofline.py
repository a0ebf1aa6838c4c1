"""How far the roofline is from what others measured: the published fits of A100 runs (OPT, costs `a100-80g-raw`) and,
where the extra `gpu-tables` is installed, the operator tables of aiconfigurator (Llama 3.1 and Qwen3 on five GPUs).

    python -m benchmarks.roofline [--json FILE|-]

Computes for seconds and measures nothing. Each cell is ours over theirs less 1, over prompts of 128 to 2,048 tokens, or
over 1 to 128 decoding sequences of 256 to 1,024 tokens (of 256 to 4,096, and up to 256 sequences, for the tables).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.harness import report, say, table
from distserve.catalogue import model_spec
from distserve.costs import aiconfigurator, roofline
from distserve.costs.devices import device
from distserve.costs.latency import Coefficients
from distserve.costs.profile import Profile

FITS = "a100-80g-raw"
DEGREES = {"Qwen/Qwen3-8B": (1, 2, 4), "Qwen/Qwen3-32B": (1, 2, 4, 8), "meta-llama/Llama-3.1-70B": (2, 4, 8)}


@dataclass(frozen=True)
class Cell:
    """One model on one device at one tp, compared."""

    source: str
    device: str
    model: str
    tp: int
    prompts: list[float]
    decodes: list[float]


def compare(
    ours: Coefficients, theirs: Coefficients, prompts: Sequence[int], batches: Sequence[int], contexts: Sequence[int]
) -> tuple[list[float], list[float]]:
    return (
        [ours.prompts(n, n * n) / theirs.prompts(n, n * n) - 1 for n in prompts],
        [ours.decodes(b, b * c) / theirs.decodes(b, b * c) - 1 for b in batches for c in contexts],
    )


def fits() -> Iterator[Cell]:
    profile = Profile.load(FITS)
    for model, by_tp in profile.models.items():
        for tp, theirs in by_tp.items():
            ours = roofline.coefficients(model_spec(model), device(profile.device), tp, efficiency=roofline.EAGER)
            errors = compare(ours, theirs, (128, 256, 512, 1024, 2048), (1, 8, 32, 64, 94, 95, 128), (256, 512, 1024))
            yield Cell(FITS, profile.device, model, tp, *errors)


def tables() -> Iterator[Cell]:
    for name in aiconfigurator.SYSTEMS:
        for model, degrees in DEGREES.items():
            spec = model_spec(model)
            for tp in degrees:
                theirs, _ = aiconfigurator.coefficients(spec, name, tp)
                ours = roofline.coefficients(spec, device(name), tp)
                errors = compare(
                    ours, theirs, (128, 256, 512, 1024, 2048), (1, 4, 16, 32, 64, 128, 256), (256, 1024, 4096)
                )
                yield Cell("aiconfigurator", name, model, tp, *errors)


def row(name: str, cells: Sequence[Cell]) -> list[str]:
    columns = [name]
    for phase in ("prompts", "decodes"):
        errors = [error for cell in cells for error in getattr(cell, phase)]
        mean, size, worst = fmean(errors), fmean(map(abs, errors)), max(errors, key=abs)
        columns += [f"{mean:+.0%}", f"{size:.0%}", f"{worst:+.0%}"]
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE|-")
    arguments = parser.parse_args()
    header = ["", "prefill: mean", "size", "worst", "decode: mean", "size", "worst"]
    cells = list(fits())
    rows = [row(f"{cell.model} tp {cell.tp}", [cell]) for cell in cells]
    text = f"Against the fits {FITS}\n\n{table(header, [*rows, row('all', cells)])}"
    try:
        found = list(tables())
        rows = [row(f"{name} tp {tp}", group) for (name, tp), group in grouped(found).items()]
        rows += [row(name, [cell for cell in found if cell.device == name]) for name in aiconfigurator.SYSTEMS]
        text += f"\n\nAgainst aiconfigurator's tables\n\n{table(header, rows)}"
        cells += found
    except aiconfigurator.NoTables as error:
        say(f"without operator tables: {error}")
    report({"cells": [vars(cell) for cell in cells]}, text, arguments.json)


def grouped(cells: Sequence[Cell]) -> dict[tuple[str, int], list[Cell]]:
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.device, cell.tp), []).append(cell)
    return groups


if __name__ == "__main__":
    main()
