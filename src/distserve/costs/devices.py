"""The catalogue of devices: what each can do, as its vendor says. Knows no model and no measurement.

Sources are the vendors' datasheets and architecture papers. `flops` is dense 16-bit (bfloat16 or float16, accumulated
in 32 bits) without sparsity: datasheets print twice that with it. Link bandwidths are one direction: datasheets add
both. `memory` is what the driver leaves of it and torch reports (`torch.cuda.mem_get_info`, total), which is a few
percent less than the datasheet's.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from distserve.cluster import Cluster
from distserve.errors import PlanError

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of accelerator."""

    name: str
    flops: float  # FLOP/s of dense 16-bit matrix products
    bandwidth: float  # bytes/s of its memory
    memory: int  # bytes that a process can see
    link_bandwidth: (
        float  # bytes/s to the other devices of its node, one direction: NVLink, or PCIe where there is none
    )
    network_bandwidth: float  # bytes/s of a whole node of eight of them to other nodes, one direction
    source: str


_NVLINK, _PCIE3, _PCIE4, _PCIE5 = 25e9, 16e9, 32e9, 64e9  # NVLink: one of an A100's 12 links, an H100's 18
_GBPS = 1e9 / 8

CATALOGUE = {
    device.name: device
    for device in (
        Device("a100-80g", 312e12, 2039e9, 84_990_623_744, 12 * _NVLINK, 1600 * _GBPS, "NVIDIA A100 datasheet (SXM)"),
        Device(
            "a100-40g", 312e12, 1555e9, int(39.39 * _GIB), 12 * _NVLINK, 1600 * _GBPS, "NVIDIA A100 datasheet (SXM)"
        ),
        Device("a100-80g-pcie", 312e12, 1935e9, int(79.15 * _GIB), _PCIE4, 200 * _GBPS, "NVIDIA A100 datasheet (PCIe)"),
        Device(
            "h100-80g", 989.4e12, 3350e9, int(79.1 * _GIB), 18 * _NVLINK, 3200 * _GBPS, "NVIDIA H100 datasheet (SXM)"
        ),
        Device(
            "h100-pcie", 756e12, 2000e9, int(79.1 * _GIB), _PCIE5, 400 * _GBPS, "NVIDIA H100 architecture paper (PCIe)"
        ),
        Device("h200", 989.4e12, 4800e9, int(139.7 * _GIB), 18 * _NVLINK, 3200 * _GBPS, "NVIDIA H200 datasheet (SXM)"),
        Device("h20", 148e12, 4000e9, int(95.0 * _GIB), 18 * _NVLINK, 3200 * _GBPS, "NVIDIA H20 datasheet (HGX)"),
        Device(
            "b200",
            2250e12,
            8000e9,
            int(178.3 * _GIB),
            36 * _NVLINK,
            3200 * _GBPS,
            "NVIDIA DGX B200 datasheet, an eighth",
        ),
        Device("l40s", 362e12, 864e9, int(44.4 * _GIB), _PCIE4, 400 * _GBPS, "NVIDIA L40S datasheet"),
        Device("l4", 121e12, 300e9, int(22.0 * _GIB), _PCIE4, 100 * _GBPS, "NVIDIA L4 datasheet"),
        Device("a10", 125e12, 600e9, int(22.1 * _GIB), _PCIE4, 100 * _GBPS, "NVIDIA A10 datasheet"),
        Device("a10g", 70e12, 600e9, int(22.1 * _GIB), _PCIE4, 100 * _GBPS, "NVIDIA A10G product brief (AWS g5)"),
        Device("v100-32g", 125e12, 900e9, int(31.7 * _GIB), 6 * _NVLINK, 100 * _GBPS, "NVIDIA V100 datasheet (SXM2)"),
        Device("v100-16g", 125e12, 900e9, int(15.8 * _GIB), 6 * _NVLINK, 100 * _GBPS, "NVIDIA V100 datasheet (SXM2)"),
        Device("t4", 65e12, 320e9, int(14.6 * _GIB), _PCIE3, 100 * _GBPS, "NVIDIA T4 datasheet"),
        Device("rtx-4090", 165.2e12, 1008e9, int(23.6 * _GIB), _PCIE4, 100 * _GBPS, "NVIDIA Ada architecture paper"),
        Device("rtx-3090", 71e12, 936e9, int(23.7 * _GIB), _PCIE4, 100 * _GBPS, "NVIDIA GA102 architecture paper"),
        Device("rtx-a6000", 154.8e12, 768e9, int(47.4 * _GIB), _PCIE4, 100 * _GBPS, "NVIDIA RTX A6000 datasheet"),
    )
}


def device(name: str) -> Device:
    """The device of this name, in any case. Raises `PlanError` with the cure."""
    if found := CATALOGUE.get(name.lower()):
        return found
    if name.lower() in ("cpu", "cuda"):
        raise PlanError(
            f"device {name!r} says nothing of its speed: measure it (distserve profile) and give its costs, or name "
            f"one of the catalogue: {', '.join(CATALOGUE)}"
        )
    close = [known for known in CATALOGUE if known.startswith(name.lower())] if name else []
    close = close or difflib.get_close_matches(name.lower(), CATALOGUE, 1, cutoff=0.5)
    cure = f"did you mean {' or '.join(close)}?" if close else f"one of {', '.join(CATALOGUE)}"
    raise PlanError(f"there is no device {name!r} in the catalogue: {cure}")


def device_at(cluster: Cluster, name: str) -> Device:
    """What the device called `name` ("node0:3") of `cluster` is, the cluster's overrides applied."""
    found = device(cluster.device)
    for override in cluster.overrides_of(name):
        if override.device is not None:
            found = device(override.device)
        changes = {
            key: value for key in ("memory", "flops", "bandwidth") if (value := getattr(override, key)) is not None
        }
        found = replace(found, **changes)
    return found


def assumed_cluster(device: Device, num_devices: int) -> Cluster:
    """Nodes of eight `device`s as its vendor builds them, enough for `num_devices`: for a plan without a cluster."""
    if num_devices <= 8:
        return Cluster(device.name, 1, max(num_devices, 8), device.link_bandwidth, device.network_bandwidth)
    return Cluster(device.name, -(-num_devices // 8), 8, device.link_bandwidth, device.network_bandwidth)
