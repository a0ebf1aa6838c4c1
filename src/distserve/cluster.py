"""A cluster: which devices there are, how they are grouped in nodes, and how fast bytes move between them. One file
that a human can diff. Knows names of devices, not what they can do (that is `costs/devices.py`).

    name or file --load()--> Cluster --device_names()--> "node0:0", "node0:1", ..., "node3:7"
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from distserve import machine, toml_file
from distserve.errors import PlanError, UsageError
from distserve.plan import parse_memory

_RATE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]i?B/s|B/s|[KMGT]b(?:ps|it/s))")
_NAME = re.compile(r"(?P<kind>[a-z][a-z0-9-]*?)-(?P<nodes>\d+)x(?P<devices>\d+)")
_PLACE = re.compile(r"node(?P<node>\d+)(?::(?P<index>\d+))?")
_MAX_DEVICES = 65536

# Built-in kinds: NAME-4x8 is four nodes of eight. (device, intra- and inter-node bandwidth, what it is)
KINDS: Mapping[str, tuple[str, float, float, str]] = {
    "a100": ("a100-80g", 300e9, 25e9 / 8, "the DistServe paper's testbed: A100-80GB SXM, 25 Gbit/s between nodes"),
    "dgx-a100": ("a100-80g", 300e9, 200e9, "NVIDIA DGX A100: eight 200 Gbit/s adapters a node"),
    "h100": ("h100-80g", 450e9, 400e9, "NVIDIA DGX H100: eight 400 Gbit/s adapters a node"),
    "h200": ("h200", 450e9, 400e9, "NVIDIA DGX H200: eight 400 Gbit/s adapters a node"),
    "b200": ("b200", 900e9, 400e9, "NVIDIA DGX B200: eight 400 Gbit/s adapters a node"),
    "l40s": ("l40s", 32e9, 50e9, "AWS g6e.48xlarge: PCIe 4.0 x16, 400 Gbit/s a node"),
    "l4": ("l4", 32e9, 12.5e9, "AWS g6.48xlarge: PCIe 4.0 x16, 100 Gbit/s a node"),
    "a10g": ("a10g", 32e9, 12.5e9, "AWS g5.48xlarge: PCIe 4.0 x16, 100 Gbit/s a node"),
}
LOCAL = "local"  # this machine
# What its devices move between them where no costs say what was measured: a copy in memory, PCIe 4.0 x16.
COPY, PCIE = 10e9, 32e9
EXAMPLES = ("a100-4x8", "dgx-a100-4x8", "h100-1x8", "h100-4x8", "h200-1x8", "b200-1x8")


@dataclass(frozen=True, slots=True)
class Override:
    """What differs on one device, or on all of one node. None: as on the others."""

    device: str | None = None  # a name of the device catalogue
    memory: int | None = None  # bytes
    flops: float | None = None  # FLOP/s of dense 16-bit matrix products
    bandwidth: float | None = None  # bytes/s of its memory

    def __post_init__(self) -> None:
        given: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        if given["device"] is not None and not isinstance(given["device"], str):
            raise PlanError(f"device = {given['device']!r}: must be a name of the device catalogue")
        if given["memory"] is not None:
            object.__setattr__(self, "memory", _memory(given["memory"]))
        object.__setattr__(self, "bandwidth", parse_rate("bandwidth", given["bandwidth"]))
        for name in ("flops", "bandwidth"):
            value: Any = getattr(self, name)
            good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
            if value is not None and not good:
                raise PlanError(f"{name} = {value!r}: must be a finite number above 0")


@dataclass(frozen=True, slots=True)
class Cluster:
    """Devices in nodes. Bandwidths are bytes/s in one direction."""

    device: str  # a name of the device catalogue
    nodes: int
    devices_per_node: int | tuple[int, ...]  # the same in each node, or one number a node
    intra_node_bandwidth: float  # between one device and the others of its node
    inter_node_bandwidth: float = 0.0  # between one node and the others, shared by its devices; one node: no matter
    intra_node_latency: float = 10e-6  # seconds of a transfer of no bytes
    inter_node_latency: float = 50e-6
    overrides: tuple[tuple[str, Override], ...] = ()  # (device or node, what differs there)

    def __post_init__(self) -> None:
        self._coerce()
        device: Any = self.device
        if not isinstance(device, str) or not device:
            raise PlanError(f'device = {device!r}: must be a name of the device catalogue, such as "a100-80g"')
        sizes = self.devices_per_node
        for name, counts in (("nodes", (self.nodes,)), ("devices_per_node", sizes)):
            for count in counts if isinstance(counts, tuple) else (counts,):
                if type(count) is not int or not 1 <= count <= _MAX_DEVICES:
                    raise PlanError(f"{name} = {count!r}: must be a whole number from 1 to {_MAX_DEVICES}")
        if isinstance(sizes, tuple) and len(sizes) != self.nodes:
            raise PlanError(
                f"devices_per_node lists {len(sizes)} nodes but nodes = {self.nodes}: give one number for each node"
            )
        if self.num_devices > _MAX_DEVICES:
            raise PlanError(f"the cluster has {self.num_devices} devices: at most {_MAX_DEVICES} can be planned for")
        self._check_links()
        for place, _ in self.overrides:
            self._check_place(place)

    def _coerce(self) -> None:
        """Accepts what TOML can hold (lists, tables, "25Gbps", "40GiB") and stores it in this class's types."""
        put = object.__setattr__
        sizes: Any = self.devices_per_node
        overrides: Any = self.overrides
        put(self, "devices_per_node", tuple(sizes) if isinstance(sizes, list) else sizes)
        for name in ("intra_node_bandwidth", "inter_node_bandwidth"):
            put(self, name, parse_rate(name, getattr(self, name)))
        if isinstance(overrides, Mapping):
            put(self, "overrides", tuple((str(place), _override(place, table)) for place, table in overrides.items()))

    def _check_links(self) -> None:
        for name in ("intra_node_bandwidth", "inter_node_bandwidth", "intra_node_latency", "inter_node_latency"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0:
                unit = "seconds" if name.endswith("latency") else "bytes/s"
                raise PlanError(f"{name} = {value!r}: must be {unit}, a finite number of at least 0")
        if self.intra_node_bandwidth == 0:
            raise PlanError('intra_node_bandwidth is 0: give bytes/s, such as 300e9 or "300GB/s"')
        if self.inter_node_bandwidth == 0 and self.nodes > 1:
            raise PlanError(
                f'inter_node_bandwidth is 0 or missing with nodes = {self.nodes}: give bytes/s, such as "25Gbps"'
            )

    def _check_place(self, place: str) -> None:
        found = _PLACE.fullmatch(place)
        node = int(found["node"]) if found else self.nodes
        if not found or node >= self.nodes or (found["index"] and int(found["index"]) >= self.node_sizes[node]):
            raise PlanError(f"there is no {place!r} in the cluster: it has {self.describe()}")

    @property
    def node_sizes(self) -> tuple[int, ...]:
        """Devices of each node."""
        sizes = self.devices_per_node
        return sizes if isinstance(sizes, tuple) else (sizes,) * self.nodes

    @property
    def num_devices(self) -> int:
        return sum(self.node_sizes)

    def device_names(self) -> tuple[str, ...]:
        """ "node0:0", "node0:1", ... in order."""
        return tuple(f"node{node}:{index}" for node, size in enumerate(self.node_sizes) for index in range(size))

    def __contains__(self, device: str) -> bool:
        """Whether there is a device of this name, such as "node0:3"."""
        found = _PLACE.fullmatch(device)
        if not found or found["index"] is None or int(found["node"]) >= self.nodes:
            return False
        return int(found["index"]) < self.node_sizes[int(found["node"])]

    def overrides_of(self, device: str) -> tuple[Override, ...]:
        """What differs on this device: its node's, then its own."""
        return tuple(
            override for wanted in (node_of(device), device) for place, override in self.overrides if place == wanted
        )

    def describe(self) -> str:
        """ "node0 to node3 with 8 devices each, numbered from 0"."""
        sizes = self.node_sizes
        if len(sizes) == 1:
            return f"node0 with {sizes[0]} devices, numbered from 0"
        each = f"{sizes[0]} devices each" if len(set(sizes)) == 1 else f"{', '.join(map(str, sizes))} devices"
        return f"node0 to node{self.nodes - 1} with {each}, numbered from 0"

    @classmethod
    def load(cls, name: str | Path) -> Cluster:
        """A file of docs/reference/cluster.md, or a built-in name such as "a100-4x8". Raises `PlanError`."""
        path = Path(name)
        if not path.exists() and not path.suffix:
            return _built_in(str(name))
        return cls.from_toml(toml_file.read_text(path, "cluster"), str(path))

    @classmethod
    def from_toml(cls, text: str, source: str = "cluster") -> Cluster:
        """Parses the format of docs/reference/cluster.md; `source` opens each error."""
        table = toml_file.parse(text, source)
        try:
            toml_file.check_keys(table, [field.name for field in fields(cls)])
            for key in ("device", "nodes", "devices_per_node", "intra_node_bandwidth"):
                if key not in table:
                    raise PlanError(f"{key} is missing: docs/reference/cluster.md shows a whole file")
            if not isinstance(table.get("overrides", {}), dict):
                raise PlanError('overrides must be tables: write [overrides.node1] or [overrides."node0:3"]')
            return cls(**table)
        except PlanError as error:
            raise PlanError(f"{source}: {error}") from None

    def to_toml(self) -> str:
        """The cluster as a file; what stands at its default is left out. `from_toml` gives an equal cluster back."""
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "overrides" and value != field.default:
                lines.append(f"{field.name} = {json.dumps(value)}")
        for place, override in self.overrides:
            lines += ["", f"[overrides.{json.dumps(place)}]"]
            values = [(field.name, getattr(override, field.name)) for field in fields(override)]
            lines += [f"{name} = {json.dumps(value)}" for name, value in values if value is not None]
        return "\n".join(lines) + "\n"


def node_of(device: str) -> str:
    """ "node0" of "node0:3"."""
    return device.rpartition(":")[0]


def parse_rate(name: str, value: Any) -> Any:
    """Bytes/s from "300GB/s", "40GiB/s" or "25Gbps" (bits); anything but a string is handed back as it is."""
    if not isinstance(value, str):
        return value
    found = _RATE.fullmatch(value.strip())
    if found is None:
        raise PlanError(f'{name} = "{value}": give bytes/s, such as 300e9, "300GB/s" or "25Gbps"')
    unit = found["unit"]
    scale = {"K": 1, "M": 2, "G": 3, "T": 4}.get(unit[0], 0)
    per_second = float(found["number"]) * (1024 if "i" in unit.removesuffix("it/s") else 1000) ** scale
    return per_second if "B" in unit else per_second / 8


def _built_in(name: str) -> Cluster:
    if name == LOCAL:
        return _local()
    found = _NAME.fullmatch(name.lower())
    if found and found["kind"] in KINDS:
        device, intra, inter, _ = KINDS[found["kind"]]
        try:
            return Cluster(device, int(found["nodes"]), int(found["devices"]), intra, inter)
        except PlanError as error:
            raise PlanError(f"the cluster {name!r}: {error}") from None
    close = difflib.get_close_matches(name, EXAMPLES, 1)
    cure = (
        f"did you mean {close[0]}?" if close else f"give a file, or NAME-NODESxDEVICES with NAME of {', '.join(KINDS)}"
    )
    raise PlanError(f"there is no cluster or file {name!r}: {cure}")


def _local() -> Cluster:
    """This machine's GPUs; where it has none, its cores, a device each."""
    if machine.gpus():
        return Cluster(machine.device_name("cuda"), 1, machine.gpus(), PCIE)
    return Cluster(machine.device_name("cpu"), 1, len(machine.cores()), COPY)


def _override(place: Any, table: Any) -> Override:
    where = f'overrides."{place}"'
    if not isinstance(table, Mapping):
        raise PlanError(f"{where} must be a table with {', '.join(field.name for field in fields(Override))}")
    try:
        toml_file.check_keys(table, [field.name for field in fields(Override)])
        return Override(**table)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None


def _memory(value: Any) -> int:
    try:
        memory = parse_memory(value)
    except UsageError as error:
        raise PlanError(f"memory: {error}") from None
    if isinstance(memory, float):
        raise PlanError(f'memory = {value!r} is a share: give a size, such as "40GiB"')
    return memory
