"""The catalogue of devices: plausible numbers, and answers to names that are not in it."""

from __future__ import annotations

import pytest

from distserve.costs.devices import assumed_cluster, catalogue, device
from distserve.errors import PlanError


@pytest.mark.parametrize("name", catalogue())
def test_numbers_are_in_their_units(name: str) -> None:
    """FLOP/s and bytes/s, not tera- and giga-: what a slip of a unit would break."""
    found = catalogue()[name]
    assert found.name == name
    assert 10e12 < found.flops < 10e15
    assert 100e9 < found.bandwidth < 20e12
    assert 10 << 30 < found.memory < 300 << 30
    assert 10e9 < found.link_bandwidth < 2e12
    assert 1e9 < found.network_bandwidth <= 1e12
    assert 50 < found.flops / found.bandwidth < 500 or name == "h20"
    assert found.source
    assert found.bridged == (found.link_bandwidth < 100e9)


def test_names_are_found_in_any_case() -> None:
    assert device("A100-80G") is catalogue()["a100-80g"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a100", "did you mean a100-80g"),
        ("h100", "did you mean h100-80g or h100-pcie"),
        ("abacus!", "one of a100-80g"),
        ("cpu", "profile"),
    ],
)
def test_unknown_names_are_answered_with_the_cure(name: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        device(name)


def test_without_a_cluster_the_vendors_nodes_are_assumed() -> None:
    h100 = device("h100-80g")
    one, more = assumed_cluster(h100, 3), assumed_cluster(h100, 17)
    assert (one.nodes, one.num_devices, more.nodes, more.num_devices) == (1, 8, 3, 24)
    assert more.inter_node_bandwidth == h100.network_bandwidth
