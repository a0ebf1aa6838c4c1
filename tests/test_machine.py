"""What this machine is called, by costs and clusters."""

from __future__ import annotations

import pytest

from distserve import machine
from distserve.catalogue import canonical
from distserve.cluster import Cluster
from distserve.costs.devices import catalogue
from distserve.errors import UsageError


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla T4", "t4"),
    ],
)
def test_a_gpu_is_called_as_in_the_catalogue(driver: str, name: str) -> None:
    assert machine.catalogue_name(driver) == name
    assert name in catalogue()


def test_a_gpu_that_nobody_knows_still_has_a_name() -> None:
    assert machine.catalogue_name("NVIDIA Wonder 9-GPU 1TB") == "wonder-9-gpu-1tb"
    assert machine.catalogue_name("") == "cuda"


def test_a_fingerprint_is_the_same_twice_and_names_what_computes() -> None:
    assert machine.fingerprint("cpu") == machine.fingerprint("cpu")
    assert machine.processor() in machine.fingerprint("cpu")
    assert "GiB" in machine.fingerprint("cpu")


def test_the_local_cluster_has_a_device_for_each_core_or_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: 0)
    monkeypatch.setattr(machine, "cores", lambda: [0, 1, 2])
    assert Cluster.load("local").device_names() == ("node0:0", "node0:1", "node0:2")
    assert Cluster.load("local").device == "cpu"
    monkeypatch.setattr(machine, "gpus", lambda: 2)
    monkeypatch.setattr(machine, "gpu_name", lambda index: "NVIDIA H200")
    assert Cluster.load("local").device == "h200"
    assert Cluster.load("local").num_devices == 2


def test_models_of_one_shape_have_one_name() -> None:
    assert canonical("demo") == canonical("SmolLM2-135M-instruct") == canonical("HuggingFaceTB/SmolLM2-135M")
    assert canonical("a/folder") == "a/folder"


def test_costs_of_other_kernels_are_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(machine.KERNELS_DIAL, raising=False)
    usual = machine.fingerprint("cpu")
    monkeypatch.setenv(machine.KERNELS_DIAL, "vectors")
    assert machine.fingerprint("cpu") == f"{usual}, DISTSERVE_KERNELS=vectors"
    monkeypatch.setenv(machine.KERNELS_DIAL, "fast")
    with pytest.raises(UsageError, match="auto, vectors, generic, off"):
        machine.fingerprint("cpu")
