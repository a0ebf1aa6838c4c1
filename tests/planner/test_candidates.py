"""What may be deployed is what the costs answer for, no less and no more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from tests.planner.small import MODEL

from distserve import cli
from distserve.cluster import Cluster
from distserve.costs.base import Costs
from distserve.costs.devices import catalogue
from distserve.costs.estimate import EstimatedCosts
from distserve.costs.profile import Profile
from distserve.errors import PlanError
from distserve.plan import Plan
from distserve.planner.candidates import shapes
from distserve.planner.phases import ApartCosts

SHIPPED: dict[str, Any] = json.loads(
    resources.files("distserve").joinpath("data", "costs", "a100-80g.json").read_text(encoding="utf-8")
)


def table(degrees: Sequence[str]) -> dict[str, Any]:
    """A file that knows these degrees of one model; what they take is that of tp = 1 or 2, whatever the stages."""
    by_tp = SHIPPED["models"][MODEL]
    return SHIPPED | {"models": {MODEL: {degree: by_tp[degree[0]] for degree in degrees}}}


def costs(degrees: Sequence[str]) -> Costs:
    return Profile.from_dict(table(degrees), "some.json").costs(MODEL)


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        (["1"], {(1, 1), (1, 2), (1, 4), (1, 5), (1, 8)}),  # stages of equally many of 40 layers
        (["1x2"], {(1, 2)}),
        (["1x3"], {(1, 3)}),  # stages of unequally many are no worse known where they were measured
        (["1x2", "2x1"], {(1, 2), (2, 1)}),
        (["1", "2x2"], {(1, 1), (1, 2), (1, 4), (1, 5), (1, 8), (2, 2)}),
        (["1", "1x2"], {(1, 1), (1, 2), (1, 4), (1, 5), (1, 8)}),
        (["1x16", "2x8"], set()),  # more than there are
    ],
)
def test_shapes_are_those_that_costs_answer_for(degrees: list[str], expected: set[tuple[int, int]]) -> None:
    known = costs(degrees)
    where = Cluster.load("a100-1x8")
    if not expected:
        with pytest.raises(PlanError, match="no parallelism that the costs know does"):
            shapes(known, where, 2000, 8)
        return
    found = shapes(known, where, 2000, 8)
    assert [(shape.tp, shape.pp) for shape in found] == sorted(expected, key=lambda each: (each[0] * each[1], each[0]))
    for shape in found:
        assert known.latency(shape.tp, shape.pp).pp == shape.pp


@pytest.mark.parametrize("degrees", [["1"], ["1x2"], ["2x2", "1"]])
def test_every_costs_answer_for_the_degrees_that_they_name(degrees: list[str]) -> None:
    known = costs(degrees)
    every: list[Costs] = [known, ApartCosts(known), EstimatedCosts(known.spec, catalogue()["a100-80g"])]
    for each in every:
        for tp, pp in each.degrees():
            for stages in (1, 2, 5) if pp is None else (pp,):
                assert each.latency(tp, stages).pp == stages


def test_costs_of_a_pipeline_alone_are_planned_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also each phase apart, whose other side computes in no time and was measured nowhere."""
    file, out = tmp_path / "costs.json", tmp_path / "plan.toml"
    file.write_text(json.dumps(table(["1x2"])))
    arguments = ["--model", MODEL, "--cluster", "a100-1x4", "-w", "humaneval", "--rate", "2", "-j", "1"]
    status = cli.main(["plan", *arguments, "--slo", "ttft=0.5,tpot=0.2", "--costs", str(file), "-o", str(out)])
    assert status == 0, capsys.readouterr().err
    assert {(spec.tp, spec.pp) for spec in Plan.load(out).instances} == {(1, 2)}
