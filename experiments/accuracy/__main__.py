"""Writes docs/accuracy.md and its plots: `python -m experiments.accuracy`. About two minutes on one core."""

from __future__ import annotations

from pathlib import Path

from experiments.accuracy import figures, page
from experiments.accuracy.runs import real_runs
from experiments.accuracy.score import scores

DOCS = Path(__file__).parents[2] / "docs"


def main() -> None:
    runs, found = real_runs(), scores()
    images = DOCS / "images"
    figures.distributions(found, "ttft", images / "accuracy-ttft.svg")
    figures.distributions(found, "tpot", images / "accuracy-tpot.svg")
    figures.saturated(runs["distserve-c21d11-900-9"], images / "accuracy-saturated.svg")
    figures.micro_batches(runs["distserve-c21d12-800-8"], images / "accuracy-micro-batches.svg")
    (DOCS / "accuracy.md").write_text(page.text(found), encoding="utf-8")


if __name__ == "__main__":
    main()
