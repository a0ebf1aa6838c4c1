"""The catalogue of devices: what each can do, as its vendor says. Knows no model and no measurement.

`data/devices.csv` holds them, each with its source: the vendors' datasheets and architecture papers. FLOP/s are dense
16-bit (bfloat16 or float16, accumulated in 32 bits) without sparsity: datasheets print twice that with it. Links are
one direction: datasheets add both. Memory is what the driver leaves of it and torch reports, a few percent less than
is printed on the box.
"""

from __future__ import annotations

import csv
import difflib
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

from distserve.cluster import Cluster
from distserve.errors import PlanError


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of accelerator. Bandwidths are bytes/s."""

    name: str
    flops: float  # FLOP/s of dense 16-bit matrix products
    bandwidth: float  # of its memory
    memory: int  # bytes that a process can see
    link_bandwidth: float  # to the other devices of its node, one direction
    bridged: bool  # the link is PCIe, whose host bridges the devices of a node share; False: NVLink
    network_bandwidth: float  # of a whole node of eight of them to other nodes, one direction
    source: str


@cache
def catalogue() -> dict[str, Device]:
    """Every known device by name."""
    text = resources.files("distserve").joinpath("data", "devices.csv").read_text(encoding="utf-8")
    return {
        row["name"]: Device(
            name=row["name"],
            flops=float(row["tflops"]) * 1e12,
            bandwidth=float(row["memory_bandwidth_gb"]) * 1e9,
            memory=int(float(row["memory_mib"]) * 2**20),
            link_bandwidth=float(row["link_gb"]) * 1e9,
            bridged=row["link"] == "pcie",
            network_bandwidth=float(row["network_gbit"]) * 1e9 / 8,
            source=row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    }


def device(name: str) -> Device:
    """The device of this name, in any case. Raises `PlanError` with the cure."""
    known = catalogue()
    if found := known.get(name.lower()):
        return found
    if name.lower() in ("cpu", "cuda"):
        raise PlanError(
            f"device {name!r} says nothing of its speed: measure it (distserve profile) and give its costs, or name "
            f"one of the catalogue: {', '.join(known)}"
        )
    close = [other for other in known if other.startswith(name.lower())] if name else []
    close = close or difflib.get_close_matches(name.lower(), known, 1, cutoff=0.5)
    cure = f"did you mean {' or '.join(close)}?" if close else f"one of {', '.join(known)}"
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
    return Cluster(device.name, max(1, -(-num_devices // 8)), 8, device.link_bandwidth, device.network_bandwidth)
