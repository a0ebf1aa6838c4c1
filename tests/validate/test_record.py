"""Measurements as a file: written run by run, read as they were, with the line named that is wrong."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.validate.support import load_costs, recording, write_costs

from distserve.errors import UsageError
from distserve.metrics import SLO, Record
from distserve.validate.record import Chosen, Key, Measured, Recording, read

seconds = st.floats(0, 1e4, allow_nan=False).map(lambda value: round(value, 6))
requests = st.builds(
    Record,
    seconds,
    st.integers(1, 9000),
    st.integers(1, 9000),
    st.none() | seconds,
    st.none() | seconds,
    st.sampled_from(["ok", "refused", "disconnected"]),
)


@given(st.lists(requests, min_size=1, max_size=8))
def test_a_run_comes_back_as_it_was(found: list[Record]) -> None:
    records = tuple(sorted(found, key=lambda record: record.arrival))
    run = Measured(Key("p", "w", 1.5, 3, 1), 0.5, 20.0, records, {"cpu": 0.1}, "", {"x sum": 2.0}, ("late",))
    assert Measured.from_dict(run.to_dict()) == run


def test_a_file_holds_everything_and_grows_run_by_run(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    costs = load_costs(write_costs(tmp_path / "costs.json"))
    first = recording(path, costs, (1.0, 2.0))
    first.add_chosen("1p1d", "sharegpt:0.25", Chosen((1.0, 2.0), (SLO(0.5, 0.1), SLO(1.0))))
    back = read(path)
    assert back == first
    packed = tmp_path / "runs.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(packed).runs == first.runs


def test_a_line_that_was_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    whole = recording(path, load_costs(write_costs(tmp_path / "costs.json")), (1.0,))
    path.write_text(path.read_text() + '{"cell": ["1p1d", "share')
    assert read(path) == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{}\n", "line 1"),
        ('{"format": 2, "model": "m", "machine": "x", "versions": ""}\n', "format 2, not 1"),
        ('{"format": 1, "model": "m", "machine": "x", "versions": ""}\nhello\n', "line 2"),
        ('{"format": 1, "model": "m", "machine": "x", "versions": ""}\n{"cell": ["a", "b", 1, 0, 0]}\n', "line 2"),
        ('{"format": 1, "model": "m", "machine": "x", "versions": ""}\n[1]\n', "line 2"),
    ],
)
def test_what_is_no_measurement_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read(tmp_path / "runs.jsonl")
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="no text"):
        read(tmp_path / "x.bin")


def test_what_is_in_memory_alone_writes_nothing() -> None:
    found = Recording(None, "m", "here")
    found.begin()
    found.add_chosen("p", "w", Chosen((1.0,), (SLO(1.0),)))
    assert found.chosen["p", "w"].rates == (1.0,)
