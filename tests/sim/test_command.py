"""`distserve simulate` as a person types it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from distserve.cli import main

PLAN = """
model = "facebook/opt-13b"
device = "a100-80g"

[[instances]]
role = "prefill"
tp = 2

[[instances]]
role = "decode"
"""
SLO = "ttft=0.25,tpot=0.1"


@pytest.fixture
def plan(tmp_path: Path) -> str:
    file = tmp_path / "plan.toml"
    file.write_text(PLAN)
    return str(file)


def test_a_report_for_people(plan: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--plan", plan, "--rate", "2", "-n", "300", "--slo", SLO]) == 0
    out = capsys.readouterr().out
    assert "attainment" in out
    assert "prefill-0" in out
    assert "transfer" in out


def test_a_report_for_programs(plan: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--plan", plan, "--rate", "2", "-n", "300", "--slo", SLO, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["requests"] == 300
    assert report["attainment"]["joint"] > 0.9
    assert report["rate_per_device"] == pytest.approx(2 / 3)
    assert report["costs"] == "a100-80g"
    assert set(report["instances"]) == {"prefill-0", "decode-0"}
    assert {"p50", "p90", "p99", "mean"} <= set(report["ttft"])


def test_a_file_is_replayed_whole(plan: str, tmp_path: Path) -> None:
    trace, rows, report = tmp_path / "trace.csv", tmp_path / "rows.csv", tmp_path / "report.json"
    trace.write_text("arrival,prompt_tokens,output_tokens\n0,100,5\n0.5,700,1\n2,30,40\n")
    outputs = ["--requests-out", str(rows), "--json", str(report)]
    assert main(["simulate", "--plan", plan, "--workload", str(trace), *outputs]) == 0
    with rows.open() as file:
        found = list(csv.DictReader(file))
    assert [row["status"] for row in found] == ["ok"] * 3
    assert found[1]["tpot"] == ""
    assert json.loads(report.read_text())["counted"] == 3


def test_applications_have_their_own_targets(plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"{i / 4},{600 if i % 2 else 60},20,{'slow' if i % 2 else 'quick'}" for i in range(40)]
    trace.write_text("arrival,prompt_tokens,output_tokens,app\n" + "\n".join(rows) + "\n")
    targets = ["--slo", "quick:ttft=1", "--slo", "slow:ttft=0.001"]
    assert main(["simulate", "--plan", plan, "--workload", str(trace), *targets, "--json", "-"]) == 0
    by_app = json.loads(capsys.readouterr().out)["by_app"]
    assert by_app["quick"]["joint"] == 1.0
    assert by_app["slow"]["joint"] == 0.0


def test_a_goal_that_is_missed_is_exit_one(plan: str) -> None:
    command = ["simulate", "--plan", plan, "--rate", "2", "-n", "100", "--goal", "0.9", "--slo"]
    assert main([*command, "ttft=0.01"]) == 1
    assert main([*command, SLO]) == 0


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_plot(plan: str, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"run.{kind}"
    assert main(["simulate", "--plan", plan, "--rate", "2", "-n", "100", "--slo", SLO, "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "0"], "rate 0 must be above 0"),
        ([], "sharegpt has no arrival times: give --rate"),
        (["--rate", "1", "-n", "0"], "--requests 0 is too small: at least 1"),
        (["--rate", "1", "--slo", "ttft=0"], "the ttft target 0.0 must be above 0"),
        (["--rate", "1", "--costs", "nobody"], "cannot read the costs nobody"),
        (["--rate", "1", "--model", "facebook/opt-175b", "--costs", "a100-80g"], "not for facebook/opt-175b"),
        (["--rate", "1", "--model", "facebook/opt-14b"], "there is no model 'facebook/opt-14b'"),
        (["--rate", "1", "--device", "a1000"], "there is no device 'a1000'"),
        (["--rate", "1", "--cluster", "nowhere"], "nowhere"),
        (["--rate", "1", "--workload", "sharegtp"], "did you mean sharegpt?"),
        (["--rate", "1", "--warmup", "1e9"], "longer than the arrivals"),
        (["--rate", "1", "--json", "/nowhere/x.json"], "--json /nowhere/x.json: cannot be written"),
        (["--rate", "1", "-n", "50", "--plot", "run.doc"], "name a file that ends in .png or .svg"),
    ],
)
def test_bad_input_is_one_line(
    plan: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(plan).parent)
    assert main(["simulate", "--plan", plan, *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "no requests"),
        ("nan,10,10\n", "must be finite and 0 or more"),
        ("-1,10,10\n", "must be finite and 0 or more"),
        ("2,10,10\n1,10,10\n", "sort the file by arrival"),
        ("1,0,10\n", "must be at least 1"),
    ],
)
def test_a_bad_workload_is_one_line(
    plan: str, tmp_path: Path, rows: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival,prompt_tokens,output_tokens\n" + rows)
    assert main(["simulate", "--plan", plan, "--workload", str(trace)]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_that_names_a_device_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(PLAN.replace("tp = 2", 'devices = [["node0:0"]]') + 'devices = [["node0:0"]]\n')
    assert main(["simulate", "--plan", str(file), "--rate", "1"]) == 2
    assert "more than once" in capsys.readouterr().err


def test_queues_that_grow_are_told(plan: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Six requests a second are more than one decode device finishes."""
    command = ["simulate", "--plan", plan, "--slo", SLO, "-n", "1500", "--rate"]
    main([*command, "6"])
    assert "its queues have not settled" in capsys.readouterr().err
    main([*command, "1"])
    assert "settled" not in capsys.readouterr().err
