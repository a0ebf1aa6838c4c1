"""What every drawing shares: a figure, refused before the work where it cannot be drawn, and how latencies spread.

Knows matplotlib (extra `plots`), and only when it draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distserve.errors import UsageError
from distserve.outputs import check_writable

FORMATS = (".png", ".svg")


def check(option: str, path: Path | None) -> None:
    """Refuses before the work what would only fail after it. Raises `UsageError`."""
    if path is None:
        return
    check_writable(option, path)
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{option} {path}: name a file that ends in {' or '.join(FORMATS)}")
    figure(1, 1, option)


def figure(width: float, height: float, option: str = "--plot") -> Any:
    """An empty one, of so many inches. Raises `UsageError` where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            f"{option} needs matplotlib, which is not installed: pip install 'distserve[plots]', or leave {option} out"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: Any, path: Path) -> None:
    """Writes a PNG or SVG. Raises `UsageError` where the disk says no."""
    try:
        drawn.savefig(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def distribution(axes: Any, name: str, sets: Sequence[tuple[str, Sequence[float]]], target: float | None) -> None:
    """The share of requests below each latency (s), a line for each labelled set."""
    everything = sorted(value for _, values in sets for value in values)
    for label, values in sets:
        ordered = sorted(values)
        shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
        axes.step(ordered, shares, where="post", label=label or None)
    if target is not None:
        axes.axvline(target, color="tab:red", linestyle="--", label=f"target {target:g} s")
    if everything and everything[-1] > 20 * everything[len(everything) // 2] > 0:
        axes.set_xscale("log")
    else:
        axes.locator_params(axis="x", nbins=5)
    axes.set(xlabel=f"{name} (s)", ylabel="share of requests", ylim=(0, 1.02), title=name)
    if target is not None or any(label for label, _ in sets):
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
