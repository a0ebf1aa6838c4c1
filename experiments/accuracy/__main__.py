"""Writes docs/accuracy.md and its plots: `python -m experiments.accuracy`. About two minutes on one core; with the word
`live`, seconds: only the part that is about this project's own server."""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.accuracy import figures, live, page, vectors
from experiments.accuracy.runs import real_runs
from experiments.accuracy.score import scores

DOCS = Path(__file__).parents[2] / "docs"


def main() -> None:
    images, document = DOCS / "images", DOCS / "accuracy.md"
    first = document.read_text(encoding="utf-8").partition(live.TITLE)[0] if sys.argv[1:] == ["live"] else a100(images)
    live.draw(images / "accuracy-live.svg")
    document.write_text(f"{first.rstrip()}\n\n{of_our_server()}", encoding="utf-8")


def of_our_server() -> str:
    """The part about this project's own."""
    return f"{live.text()}\n{vectors.text()}\n"


def a100(images: Path) -> str:
    """The part about real runs on A100 GPUs."""
    runs, found = real_runs(), scores()
    figures.distributions(found, "ttft", images / "accuracy-ttft.svg")
    figures.distributions(found, "tpot", images / "accuracy-tpot.svg")
    figures.saturated(runs["distserve-c21d11-900-9"], images / "accuracy-saturated.svg")
    figures.micro_batches(runs["distserve-c21d12-800-8"], images / "accuracy-micro-batches.svg")
    return page.text(found)


if __name__ == "__main__":
    main()
