"""Clusters: the file, the built-in names, and what is said of a bad one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.cluster import KINDS, Cluster, Override, node_of
from distserve.costs import devices
from distserve.errors import PlanError

FILE = """
device = "a100-80g"
nodes = 3
devices_per_node = [8, 8, 4]
intra_node_bandwidth = "300GB/s"
inter_node_bandwidth = "25Gbps"

[overrides.node2]
device = "a100-40g"

[overrides."node0:7"]
memory = "40GiB"
bandwidth = "1.5TB/s"
"""


def test_reads_every_key() -> None:
    cluster = Cluster.from_toml(FILE)
    assert cluster.node_sizes == (8, 8, 4)
    assert cluster.num_devices == 20
    assert cluster.intra_node_bandwidth == 300e9
    assert cluster.inter_node_bandwidth == 3.125e9
    assert cluster.device_names()[7:9] == ("node0:7", "node1:0")
    assert cluster.device_names()[-1] == "node2:3"
    assert "node2:3" in cluster
    assert "node2:4" not in cluster
    assert "node3:0" not in cluster
    assert "node1" not in cluster
    assert cluster.overrides_of("node2:0") == (Override(device="a100-40g"),)
    assert cluster.overrides_of("node0:7") == (Override(memory=40 << 30, bandwidth=1.5e12),)
    assert cluster.overrides_of("node0:0") == ()
    assert devices.device_at(cluster, "node2:3").bandwidth == 1555e9
    assert devices.device_at(cluster, "node0:7").memory == 40 << 30
    assert devices.device_at(cluster, "node1:7") == devices.device("a100-80g")
    assert node_of("node1:7") == "node1"
    assert cluster.describe() == "node0 to node2 with 8, 8, 4 devices, numbered from 0"
    assert Cluster.load("h100-1x4").describe() == "node0 with 4 devices, numbered from 0"


def test_the_papers_testbed() -> None:
    cluster = Cluster.load("a100-4x8")
    assert (cluster.device, cluster.num_devices) == ("a100-80g", 32)
    assert cluster.inter_node_bandwidth == 25e9 / 8
    assert len(cluster.device_names()) == len(set(cluster.device_names())) == 32
    assert Cluster.load("H100-32x8").num_devices == 256


@pytest.mark.parametrize("kind", KINDS)
def test_built_in_names_agree_with_the_device_catalogue(kind: str) -> None:
    cluster = Cluster.load(f"{kind}-2x8")
    found = devices.device(cluster.device)
    assert cluster.intra_node_bandwidth == found.link_bandwidth
    if kind != "a100":  # the paper's nodes have a slower network than the vendor's
        assert cluster.inter_node_bandwidth == found.network_bandwidth


def test_a_file_is_read_back(tmp_path: Path) -> None:
    for cluster in (Cluster.from_toml(FILE), Cluster.load("a100-1x8"), Cluster.load("dgx-a100-4x8")):
        (tmp_path / "cluster.toml").write_text(cluster.to_toml())
        assert Cluster.load(tmp_path / "cluster.toml") == cluster


sizes = st.integers(1, 16)
rates = st.floats(1e6, 1e13)
overrides = st.builds(
    Override,
    device=st.none() | st.sampled_from(["a100-40g", "h100-80g"]),
    memory=st.none() | st.integers(2, 1 << 40),
    flops=st.none() | rates,
    bandwidth=st.none() | rates,
)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    nodes = draw(st.integers(1, 5))
    per_node = draw(sizes | st.tuples(*[sizes] * nodes))
    places = draw(st.lists(st.integers(0, nodes - 1).map(lambda n: f"node{n}") | st.just("node0:0"), unique=True))
    latency = st.floats(0, 1)
    return Cluster(
        "a100-80g",
        nodes,
        per_node,
        draw(rates),
        draw(rates),
        draw(latency),
        draw(latency),
        tuple((place, draw(overrides)) for place in places),
    )


@given(clusters())
def test_any_cluster_survives_its_file(cluster: Cluster) -> None:
    assert Cluster.from_toml(cluster.to_toml()) == cluster
    assert len(cluster.device_names()) == cluster.num_devices
    assert all(device in cluster for device in cluster.device_names())


BASE: dict[str, Any] = {
    "device": "a100-80g",
    "nodes": 2,
    "devices_per_node": 8,
    "intra_node_bandwidth": 300e9,
    "inter_node_bandwidth": 3e9,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": ""}, ["device = ''", "a100-80g"]),
        ({"device": 7}, ["device = 7"]),
        ({"nodes": 0}, ["nodes = 0", "from 1"]),
        ({"nodes": True}, ["nodes = True"]),
        ({"nodes": 10**12}, ["nodes = 1000000000000", "65536"]),
        ({"nodes": 60000}, ["480000 devices", "65536"]),
        ({"devices_per_node": [8]}, ["lists 1 nodes", "nodes = 2"]),
        ({"devices_per_node": [8, 0]}, ["devices_per_node = 0"]),
        ({"devices_per_node": "8"}, ["devices_per_node = '8'"]),
        ({"intra_node_bandwidth": 0}, ["intra_node_bandwidth is 0", "300GB/s"]),
        ({"intra_node_bandwidth": float("nan")}, ["intra_node_bandwidth = nan", "finite"]),
        ({"inter_node_bandwidth": 0}, ["inter_node_bandwidth is 0", "25Gbps"]),
        ({"inter_node_bandwidth": "25 Gb"}, ['inter_node_bandwidth = "25 Gb"', '"25Gbps"']),
        ({"inter_node_latency": -1}, ["inter_node_latency = -1", "seconds"]),
        ({"overrides": {"node2": {}}}, ["'node2'", "node0 to node1"]),
        ({"overrides": {"node0:8": {}}}, ["'node0:8'", "8 devices each"]),
        ({"overrides": {"node0": {"memory": 0.5}}}, ['overrides."node0"', "is a share"]),
        ({"overrides": {"node0": {"memory": "much"}}}, ["'much' is not an amount"]),
        ({"overrides": {"node0": {"flop": 1}}}, ["unknown key 'flop'", "'flops'"]),
        ({"overrides": {"node0": {"flops": 0}}}, ["flops = 0", "above 0"]),
        ({"overrides": {"node0": {"device": 1}}}, ["device = 1"]),
        ({"overrides": {"node0": 3}}, ["must be a table"]),
    ],
)
def test_a_bad_value_is_named_with_its_limit_and_cure(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        Cluster(**{**BASE, **change})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("device =", ["c.toml: not TOML"]),
        ("nodes = 2", ["c.toml: device is missing", "cluster.md"]),
        ("node = 2", ["unknown key 'node'", "'nodes'"]),
        (FILE.replace("[overrides.node2]", "[[overrides]]").split('[overrides."')[0], ["overrides must be tables"]),
    ],
)
def test_a_bad_file_is_named(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(PlanError) as caught:
        Cluster.load(tmp_path / "c.toml")
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a100-4x", ["did you mean a100-4x8?"]),
        ("tpu-4x8", ["NAME-NODESxDEVICES", "a100"]),
        ("a100-0x8", ["'a100-0x8'", "nodes = 0"]),
        ("none.toml", ["cannot read the cluster none.toml"]),
    ],
)
def test_an_unknown_name_is_answered_with_the_cure(name: str, words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        Cluster.load(name)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="not a text file"):
        Cluster.load(tmp_path / "c.toml")
