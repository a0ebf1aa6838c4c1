"""How long it takes to pull a request's KV from one instance to another, others pulling meanwhile. Knows links and
shares of KV, no scheduler and no clock.

A target rank reads from each source rank the layers and heads that both hold. What a pair of ranks moves loads

    in one node      the sending device's link and the receiving device's
    between nodes    the sending node's network and the receiving node's, which all devices of a node share
    on one device    nothing: it is read where it lies

A link is shared equally by the pulls that load it, whatever they move over it, and a pull goes on at the speed that its
tightest link leaves: the transfers of all its ranks advance together.

    KV bytes/s of a pull  =  min over its links of   capacity / (pulls on the link * bytes on it per byte of KV)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from distserve.cluster import Cluster, node_of
from distserve.costs.memory import sharding
from distserve.costs.seats import Seats
from distserve.sharding import Sharding, parts
from distserve.specs import ModelSpec

Link = tuple[str, str]  # ("send" | "receive", device) in a node; ("out" | "in", node) between nodes


@dataclass(frozen=True, slots=True)
class Route:
    """What a pull between two instances loads."""

    loads: tuple[tuple[Link, float], ...]  # bytes that go over the link for each byte of the request's KV
    latency: float  # seconds before the first byte


@dataclass(frozen=True, slots=True)
class Links:
    """The links of a cluster, and the shares that pulls get of them."""

    cluster: Cluster
    # Share of a link's nominal bandwidth that large copies reach: NVLink and PCIe copies measure 80-90 % of it
    # (nccl-tests, NVIDIA's p2pBandwidthLatencyTest), RDMA and tuned TCP about 90 % of the wire.
    efficiency: float = 0.85

    def capacity(self, link: Link) -> float:
        """Bytes/s."""
        inside = link[0] in ("send", "receive")
        return self.efficiency * (self.cluster.intra_node_bandwidth if inside else self.cluster.inter_node_bandwidth)

    def route(self, spec: ModelSpec, source: Seats, target: Seats) -> Route:
        """What pulls from `source` to `target` load."""
        loads: dict[Link, int] = {}
        latency = 0.0
        sources, targets = _nodes(source.devices), _nodes(target.devices)
        for sender, receiver, pieces in shares(spec, source, target):
            there, here = source.devices[sender], target.devices[receiver]
            if there == here:
                continue
            out_of, into = sources[sender], targets[receiver]
            inside = out_of == into
            links: tuple[Link, Link] = (
                (("send", there), ("receive", here)) if inside else (("out", out_of), ("in", into))
            )
            for link in links:
                loads[link] = loads.get(link, 0) + pieces
            latency = max(latency, self.cluster.intra_node_latency if inside else self.cluster.inter_node_latency)
        whole = spec.num_layers * spec.num_kv_heads
        return Route(tuple((link, pieces / whole) for link, pieces in sorted(loads.items())), latency)

    def rate(self, route: Route, pulls_on: Mapping[Link, int]) -> float:
        """KV bytes/s of a pull on `route`, where so many pulls (itself among them) load each of its links. Infinite
        where it loads none."""
        return min((self.capacity(link) / (pulls_on[link] * share) for link, share in route.loads), default=math.inf)

    def rates(self, routes: Sequence[Route]) -> list[float]:
        """KV bytes/s of each of the pulls that go on at once."""
        pulls_on = Counter(link for route in routes for link, _ in route.loads)
        return [self.rate(route, pulls_on) for route in routes]

    def seconds(self, route: Route, kv_bytes: float) -> float:
        """Of a pull that is alone."""
        return route.latency + kv_bytes / self.rates([route])[0]


def shares(spec: ModelSpec, source: Seats, target: Seats) -> tuple[tuple[int, int, int], ...]:
    """(source rank, target rank, how many of the request's layers * KV heads the second reads from the first). Where
    ranks outnumber the heads several hold the same: readers take turns at the copies, and what the ranks of a target
    hold is then more than once the whole."""
    return _shares(sharding(spec, source.tp, source.pp), sharding(spec, target.tp, target.pp))


@cache
def _nodes(devices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(node_of, devices))


@cache
def _shares(source: Sharding, target: Sharding) -> tuple[tuple[int, int, int], ...]:
    return tuple((part.source, part.target, len(part.layers) * len(part.heads)) for part in parts(source, target))
