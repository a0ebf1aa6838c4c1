"""The steps that a server wrote of a run: read once, whole lines alone, on the run's clock."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.serve.steplog import HEADER
from distserve.validate.steps import COLUMNS, Step, StepFiles, from_columns, to_columns

SOME = [Step(0.1, 0.02, 64, 4096, 0, 0), Step(0.2, 0.015, 0, 0, 3, 250)]


def test_the_columns_are_those_that_the_server_writes() -> None:
    assert ",".join(COLUMNS) + "\n" == HEADER


def test_a_run_gets_the_steps_since_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "decode-0.csv"
    files = StepFiles(tmp_path)
    path.write_text(HEADER + "99.0,0.5,0,0,1,10\n100.25,0.5,0,0,2,30\n101.0,0.0")  # a line is being written
    assert files.since(100.0) == {"decode-0": [Step(0.25, 0.5, 0, 0, 2, 30)]}, "what ended before it began is not its"
    with path.open("a") as file:
        file.write("3,7,49,0,0\n")
    assert files.since(100.0) == {"decode-0": [Step(1.0, 0.03, 7, 49, 0, 0)]}
    assert files.since(100.0) == {"decode-0": []}


def test_columns_are_steps_again() -> None:
    assert list(from_columns(to_columns(SOME))) == SOME
    assert from_columns(to_columns([])) == ()
    with pytest.raises(ValueError, match="5 columns"):
        from_columns([[1.0]] * 5)


steps = st.builds(Step, st.floats(0, 100), st.floats(0, 1), *[st.integers(0, 10**6)] * 4)


@given(st.lists(steps, max_size=5))
def test_times_are_kept_to_a_tenth_of_a_millisecond(given_steps: list[Step]) -> None:
    found = from_columns(to_columns(given_steps))
    for step, kept in zip(given_steps, found, strict=True):
        assert kept.began == pytest.approx(step.began, abs=1e-4)
        assert kept[2:] == step[2:]
