"""Costs of what nobody measured: which source was taken, and what it says of itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distserve.catalogue import model_spec
from distserve.costs import roofline
from distserve.costs.base import Costs, Engine
from distserve.costs.devices import device
from distserve.costs.estimate import EstimatedCosts, estimate
from distserve.costs.memory import Accounting, capacity
from distserve.costs.roofline import EAGER
from distserve.errors import PlanError

OPT, A100 = model_spec("facebook/opt-66b"), device("a100-80g")


def test_the_roofline_where_there_is_no_table() -> None:
    found = estimate(OPT, A100, 4)
    assert found.coefficients == roofline.coefficients(OPT, A100, 4)
    assert "roofline of a100-80g" in found.source
    assert "models no opt" in found.source


def test_the_roofline_where_it_is_asked_for() -> None:
    qwen, h200 = model_spec("Qwen/Qwen3-8B"), device("h200")
    assert "as asked" in estimate(qwen, h200, tables=False).source
    eager = estimate(qwen, h200, efficiency=EAGER)
    assert eager.coefficients == roofline.coefficients(qwen, h200, efficiency=EAGER)
    changed = estimate(qwen, replace(h200, flops=1e14))
    assert "not the catalogue's" in changed.source


def test_it_answers_as_costs_do() -> None:
    costs: Costs = EstimatedCosts(OPT, A100, engine=Engine(block_size=16, handover=1e-3))
    whole, half = costs.latency(4, 1), costs.latency(4, 2)
    assert whole.decodes(8, 4096) == roofline.coefficients(OPT, A100, 4).decodes(8, 4096)
    assert half.share == 0.5
    assert half.decodes(8, 4096) == pytest.approx(whole.decodes(8, 4096) + 2e-3)
    assert costs.kv_blocks(4, 1) == capacity(OPT, A100.memory, 4).num_blocks
    assert costs.kv_blocks(4, 1, 1 << 30) == capacity(OPT, A100.memory, 4, kv_memory=1 << 30).num_blocks
    assert costs.assumed_cluster(12).node_sizes == (8, 8)
    assert costs.dtype == "float16"
    notes = costs.notes(1000, 10, 1000)
    assert len(notes) == 1
    assert notes[0].startswith("costs at tp = 4: roofline of a100-80g")


def test_blocks_are_the_engines() -> None:
    small, large = (EstimatedCosts(OPT, A100, engine=Engine(block_size=size)).kv_blocks(4, 1) for size in (16, 32))
    assert small in (2 * large, 2 * large + 1)
    careless = EstimatedCosts(OPT, A100, engine=Engine(block_size=16), accounting=Accounting(utilization=1.0))
    assert careless.kv_blocks(4, 1) > small


def test_what_does_not_fit_is_refused() -> None:
    costs = EstimatedCosts(OPT, A100)
    with pytest.raises(PlanError, match=r"tp = 1 and pp = 1 does not fit a100-80g: each device lacks \d+\.\d GiB"):
        costs.kv_blocks(1, 1)
    with pytest.raises(PlanError, match="tp = 5 does not divide"):
        costs.latency(5, 1)
    assert (9, None) in EstimatedCosts(OPT, A100).degrees()
