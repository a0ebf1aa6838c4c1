"""Drawings of runs: that they are made, and what is in them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.bench.test_measure import results, told

from distserve import plots
from distserve.bench.client import Result
from distserve.bench.load import Run
from distserve.bench.measure import Outcome
from distserve.bench.plot import draw, timelines
from distserve.errors import UsageError
from distserve.metrics import SLO, Record
from distserve.traces import Arrival


def outcome(rate: float) -> Outcome:
    return told(Run(400, results(), cpu=1.0, seconds=40.0), rate, SLO(ttft=0.25, tpot=0.1))


@pytest.mark.parametrize("number", [1, 3, 12])
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_runs_are_drawn(tmp_path: Path, number: int, suffix: str) -> None:
    path = tmp_path / f"p{suffix}"
    draw([outcome(float(i + 1)) for i in range(number)], 0.9, 3.0 if number > 1 else None, "a title", path)
    start = path.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if suffix == ".png" else b"<?xml" in start


def test_nothing_answered_is_drawn_too(tmp_path: Path) -> None:
    failed = [Result(Record(r.asked.arrival, 1, 1, status="refused"), 0.1, 0.0, r.asked) for r in results()]
    draw([told(Run(400, failed, cpu=1.0, seconds=40.0))], 0.9, None, "t", tmp_path / "p.png")


def test_timelines_count_who_is_there_and_who_waits() -> None:
    def result(arrival: float, ttft: float | None, end: float) -> Result:
        return Result(Record(arrival, 1, 2, ttft, status="ok"), end, 0.0, Arrival(arrival, 1, 2))

    # due at 0, 1 and 2 s after the start at 100; the last was refused at once
    found = [result(5.0, 1.5, 104.0), result(6.0, 2.0, 105.0), result(7.0, None, 102.0)]
    in_flight, waiting = timelines(found, 100.0, 5.0)
    assert in_flight == ([0.0, 0.0, 1.0, 2.0, 2.0, 4.0, 5.0], [0, 1, 2, 1, 2, 1, 0])
    assert waiting == ([0.0, 0.0, 1.0, 1.5, 2.0, 2.0, 3.0], [0, 1, 2, 1, 0, 1, 0])


def test_a_drawing_that_cannot_be_made_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plots.check("--plot", None)
    plots.check("--plot", tmp_path / "p.svg")
    with pytest.raises(UsageError, match=r"--plot .*p.pdf: name a file that ends in .png or .svg"):
        plots.check("--plot", tmp_path / "p.pdf")
    with pytest.raises(UsageError, match="cannot be written"):
        plots.check("--plot", tmp_path / "none" / "p.png")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install 'distserve\[plots\]'"):
        plots.check("--plot", tmp_path / "p.png")
