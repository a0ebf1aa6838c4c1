"""`distserve validate` as a person types it: against a real server over HTTP (that computes nothing), and on recorded
runs alone."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.bench.standin import StandIn, serving
from tests.validate.support import load_costs, recording, write_costs

from distserve.cli import main
from distserve.validate.live import parse
from distserve.validate.record import read

PLAN = '[[instances]]\nrole = "prefill"\n\n[[instances]]\nrole = "decode"\n'
SLO = "ttft=1,tpot=0.1"


@pytest.fixture
def server() -> Iterator[StandIn]:
    with serving() as standin:
        yield standin


class Command:
    """In this process, with its files in a folder of the test's own."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.costs = write_costs(folder / "costs.json")
        self.plan = folder / "mine.toml"
        self.plan.write_text(PLAN)
        self._capture = capture

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        status = main(["validate", "--costs", str(self.costs), *map(str, arguments)])
        return status, *self._capture.readouterr()

    def live(self, server: StandIn, *arguments: object) -> tuple[int, str, str]:
        return self("--plan", self.plan, "--url", server.url, "-w", "humaneval:0.1,0.05", "--slo", SLO, *arguments)


@pytest.fixture
def validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, capsys)


def test_a_live_server_is_measured_and_compared(validate: Command, server: StandIn) -> None:
    server.behaviour.first, server.behaviour.gap = 0.03, 0.03
    out = {name: validate.folder / name for name in ("all.json", "rows.csv", "plot.svg", "runs.jsonl")}
    status, shown, said = validate.live(
        server, "--rates", "10,20", "-n", 30, "--repeats", 2, "--json", out["all.json"], "--requests-out",
        out["rows.csv"], "--plot", out["plot.svg"], "--record", out["runs.jsonl"],
    )  # fmt: skip
    assert status == 0
    assert "4 runs; measuring takes about" in said
    assert "1 of 4" in said
    assert said.count("measured on nowhere, but the machine of the measurements is") == 1
    assert "error of the prediction" in shown
    found = json.loads(out["all.json"].read_text())
    assert len(found["cells"]) == 2
    for cell in found["cells"]:
        assert len(cell["measured"]) == 2
        assert cell["measured"][0]["requests"] == cell["predicted"]["requests"] == 30
        assert cell["measured"][0]["ttft"]["p50"] > 0.03
        assert cell["attainment_noise"] is not None
    with out["rows.csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 120
    assert all(float(row["predicted_ttft"]) > 0 and row["predicted_status"] == "ok" for row in rows)
    assert "<svg" in out["plot.svg"].read_text()
    # what was offered is the same each time, and in the record
    runs = read(out["runs.jsonl"]).runs
    assert len(runs) == 4
    by_rate: dict[float, set[Any]] = {}
    for key, run in runs.items():
        by_rate.setdefault(key.rate, set()).add(tuple((r.arrival, r.prompt_tokens) for r in run.records))
    assert [len(each) for each in by_rate.values()] == [1, 1]


def test_what_is_recorded_is_not_measured_again(validate: Command, server: StandIn) -> None:
    runs = validate.folder / "runs.jsonl"
    assert validate.live(server, "--rates", "20", "-n", 20, "--record", runs)[0] == 0
    assert [chosen.rates for chosen in read(runs).chosen.values()] == [()]  # rates that were given are no choice
    sent = len(server.bodies)
    status, _, said = validate.live(server, "--rates", "20", "-n", 20, "--record", runs)
    assert (status, len(server.bodies)) == (0, sent)
    assert "1 of them measured before" in said
    validate.live(server, "--rates", "20,25", "-n", 20, "--record", runs)
    assert len(server.bodies) == sent + 8 + 20  # the warm-up, and the new rate
    status, again, _ = validate("--from", runs, "--slo", SLO)
    assert status == 0
    assert "20/s" in again
    assert "25/s" in again
    assert len(server.bodies) == sent + 28


def test_time_that_is_too_short_leaves_the_rest_for_later(validate: Command, server: StandIn) -> None:
    runs = validate.folder / "runs.jsonl"
    status, _, said = validate.live(server, "--rates", "20", "-n", 20, "--record", runs, "--time", 0.5)
    assert status == 1
    assert "nothing was measured" in said
    assert not server.bodies


def test_no_server_is_said(validate: Command, server: StandIn) -> None:
    server.stop()
    status, _, said = validate.live(server, "--rates", "20", "-n", 20)
    assert status == 1
    assert "no server answers" in said


def test_a_server_that_dies_is_counted_and_no_part_of_the_comparison(validate: Command) -> None:
    with serving() as server:
        server.behaviour.first = 0.01
        runs = validate.folder / "runs.jsonl"
        assert validate.live(server, "--rates", "20", "-n", 20, "--record", runs)[0] == 0
        before = len(server.bodies)
        server.behaviour.first = 0.3

        def die() -> None:
            server.wait_for(before + 8 + 12)
            server.stop()

        killer = threading.Thread(target=die)
        killer.start()
        report = validate.folder / "all.json"
        status, _, said = validate.live(server, "--rates", "20,25", "-n", 20, "--record", runs, "--json", report)
        killer.join(20)
    assert status == 1
    assert "died" in said or "no server answers" in said
    found = json.loads(report.read_text())
    assert len(found["cells"]) == 1
    assert found["failures"]
    assert found["not_measured"] == 1


def test_ctrl_c_keeps_what_is_measured(validate: Command, server: StandIn) -> None:
    runs = validate.folder / "runs.jsonl"
    arguments = [
        "validate", "--costs", validate.costs, "--plan", validate.plan, "--url", server.url, "-w", "humaneval:0.1,0.05",
        "--slo", SLO, "--rates", "20,0.5", "-n", 20, "--record", runs,
    ]  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-m", "distserve", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    server.wait_for(8 + 20 + 2)  # the warm-up, the first rate, and the second has begun
    child.send_signal(signal.SIGINT)
    shown, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert "what was measured is compared" in said
    assert "20/s" in shown
    assert "1 of 2 runs are not measured yet" in said
    assert len(read(runs).runs) == 1


def test_recorded_runs_are_compared_without_a_server(validate: Command) -> None:
    runs = validate.folder / "runs.jsonl"
    recording(runs, load_costs(validate.costs), (1.0, 8.0))
    status, out, said = validate("--from", runs, "--slo", "ttft=0.3,tpot=0.06", "--within", 0.01)
    assert status == 0
    assert "attainment" in out
    assert "warning" not in said
    other = validate.folder / "slower.json"
    validate.costs = write_costs(other, 1.5)
    assert validate("--from", runs, "--slo", "ttft=0.3,tpot=0.06", "--within", 0.01)[0] == 1
    assert validate("--from", runs, "--slo", "ttft=0.3,tpot=0.06")[0] == 0
    only, _, said = validate("--from", runs, "--plan", "2c-chunked", "--slo", SLO)
    assert only == 2
    assert "holds no run" in said
    assert validate("--from", runs)[0] == 2  # nobody says which targets


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "1,x"], "write numbers"),
        (["--rates", "0"], "must be above 0"),
        (["--repeats", "0"], "at least 1"),
        (["--goal", "1"], "between 0 and 1"),
        (["--duration", "0"], "above 0 seconds"),
        (["--url", "http://127.0.0.1:1"], "one --plan FILE"),
        (["--from", "x", "--record", "y"], "leave --record and --url out"),
        (["--from", "nowhere.jsonl"], "cannot read"),
        (["--record", "runs.jsonl.gz"], "pack it when it is complete"),
        (["--plan", "3c"], "none of 1p1d"),
        (["--plan", "1p1d", "-w", "nothing"], "no workload or file"),
        (["--slo", "ttft=x"], "write each target once"),
        (["--plan", "1p1d", "--model", "facebook/opt-13b"], "not for facebook/opt-13b"),
        (["--plot", "x.pdf"], ".png or .svg"),
        (["--json", "/nowhere/x.json"], "cannot be written"),
    ],
)
def test_bad_input_is_said_in_a_line(validate: Command, arguments: list[str], message: str) -> None:
    status, _, said = validate(*arguments)
    assert status == 2
    assert message in said
    assert said.count("\n") == 1


def test_costs_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate"]) == 2
    assert "distserve profile" in capsys.readouterr().err


def test_metrics_tell_where_time_went() -> None:
    text = (
        'distserve:step_seconds_sum{instance="prefill-0",role="prefill"} 2.5\n'
        'distserve:step_seconds_sum{instance="prefill-1",role="prefill"} 1\n'
        'distserve:step_seconds_count{instance="prefill-0",role="prefill"} 10\n'
        'distserve:pull_seconds_sum{model_name="m"} 0.5\nother_sum 1\n'
    )
    assert parse(text) == {
        "distserve:step_seconds prefill sum": 3.5,
        "distserve:step_seconds prefill count": 10,
        "distserve:pull_seconds sum": 0.5,
    }
