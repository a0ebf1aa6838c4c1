"""`serve --record-steps`: a line a step, of each instance, with what it computed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from tests.serve.live import serving

from distserve.errors import UsageError
from distserve.sched.base import Batch, Sequence
from distserve.serve.steplog import HEADER, Silent, StepLog, folder, step_log


def rows(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_a_step_is_told_by_what_it_computes(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "both.csv", later=lambda seconds, callback: None)
    piece = Sequence(1, num_tokens=40, num_computed=8)
    decoding = Sequence(2, num_tokens=11, num_computed=10)
    log.note(Batch(1, [(piece, 32), (decoding, 1)]), 5.0, 0.25)
    log.close()
    (row,) = rows(tmp_path / "both.csv")
    assert row == {
        "began": 5.0,
        "seconds": 0.25,
        "prompt_tokens": 32,
        "prompt_squares": 40 * 40 - 8 * 8,
        "sequences": 1,
        "context": 11,
    }


def test_nobody_asked_nothing_is_written(tmp_path: Path) -> None:
    silent = step_log(None, "both", lambda seconds, callback: None)
    assert isinstance(silent, Silent)
    silent.note(Batch(1, []), 0.0, 0.0)
    silent.close()


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--record-steps .*file: no folder can be made there"):
        folder(tmp_path / "file")


def test_both_instances_of_a_server_write_their_own(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with serving(tmp_path, "fake", "--record-steps", str(told)) as server:
        server.complete("a secret", max_tokens=5)
        server.stop()
    prefill, decode = rows(told / "prefill-0.csv"), rows(told / "decode-0.csv")
    assert len(prefill) == 1
    assert prefill[0]["prompt_tokens"] > 0
    assert [row["sequences"] for row in decode] == [1, 1, 1, 1]  # the first of five tokens is prefill's
    context = [row["context"] for row in decode]
    assert context == [context[0] + i for i in range(4)]
    assert all(row["seconds"] >= 0 for row in (*prefill, *decode))
    assert (told / "prefill-0.csv").read_text().startswith(HEADER)
    assert "secret" not in (told / "prefill-0.csv").read_text()
