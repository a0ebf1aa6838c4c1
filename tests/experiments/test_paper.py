"""Each experiment in its short form writes what it promises, with the paper's column and ours; the document holds what
was kept, and nothing else."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from experiments.__main__ import main
from experiments.paper import curves, living, page, published, systems
from experiments.paper.lab import RESULTS, Lab

NAMES = list(page.EXPERIMENTS)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, run in its short form."""
    out = tmp_path_factory.mktemp("results")
    assert main(["--quick", "--jobs", "1", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("name", NAMES)
def test_files_are_written(quick: Path, name: str) -> None:
    assert json.loads((quick / f"{name}.json").read_text())
    assert (quick / f"{name}.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("name", NAMES)
def test_tables_have_the_papers_numbers_beside_ours(quick: Path, name: str) -> None:
    with open(quick / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {who: [key for key in rows[0] if key.startswith(who)] for who in ("paper_", "ours")}
    assert columns["paper_"]
    assert columns["ours"]
    for keys in columns.values():
        assert any(row[key] for row in rows for key in keys), f"{keys} are empty"


def test_the_document_holds_every_experiment(quick: Path) -> None:
    text = page.text(Lab(quick))
    for experiment in page.EXPERIMENTS.values():
        assert f"## {experiment.TITLE}" in text
    assert "nan" not in text.lower().split()


def test_the_document_is_made_of_the_committed_results() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.text(Lab(RESULTS)), (
        "docs/guides/paper.md and experiments/results differ: run python -m experiments"
    )


def test_the_same_results_draw_the_same_files(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        assert main(["table2", "--quick", "--jobs", "1", "--out", str(tmp_path / folder)]) == 0
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


@pytest.mark.parametrize("arguments", [["fig99"], ["--jobs", "0"], ["--quick"]])
def test_a_wrong_command_says_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert arguments[0].lstrip("-") in capsys.readouterr().err


def test_scaled_targets_are_met_by_the_share_that_needs_no_more() -> None:
    case = published.cases()["opt-13b-sharegpt"]
    system = systems.of(case)[0]
    length = living.Length("as published", 60)
    found = curves.scale_curve(system, case.workload, case.slo, 1.0, [0.5, 1.0, 2.0], length)
    sample = living.sample(system, case.workload, 1.0, length)
    for scale, share in found.points:
        slo = type(case.slo)(scale * (case.slo.ttft or 0), scale * (case.slo.tpot or 0))
        assert share == pytest.approx(sample.met(slo).mean())
    assert (sample.needed(case.slo) <= found.needed).mean() >= published.GOAL


def test_a_crossing_lies_on_the_line_between_two_points() -> None:
    assert curves.crossing([(1.0, 1.0), (2.0, 0.8)]) == pytest.approx(1.5)
    assert curves.crossing([(1.0, 0.8), (2.0, 0.7)]) is None


def test_shares_of_the_latency_are_whole() -> None:
    system = systems.of(published.cases()["opt-13b-sharegpt"])[0]
    lives = living.lives(system, living.workload("sharegpt"), 3.0, 100, 0)
    assert sum(living.shares(lives)) == pytest.approx(1.0)


def test_the_papers_placement_of_the_largest_model_keeps_kv_inside_nodes() -> None:
    case = published.cases()["opt-175b-sharegpt"]
    prefill, decode = systems.of(case)[0].plan.instances
    for stage in range(case.prefill[1]):
        nodes = {
            device.split(":")[0]
            for spec, (tp, _) in ((prefill, case.prefill), (decode, case.decode))
            for device in spec.devices[0][stage * tp : (stage + 1) * tp]
        }
        assert nodes == {f"node{stage}"}
