"""What links bear: may KV move between nodes, or must it stay inside them. Knows bandwidths and lengths."""

from __future__ import annotations

from distserve.cluster import Cluster, node_of
from distserve.costs.base import Costs
from distserve.costs.memory import kv_token_bytes
from distserve.costs.network import Link, Links
from distserve.costs.seats import Seats
from distserve.plan import Plan, Role
from distserve.planner.demand import Demand

_BUSY = 0.5  # share of the nodes' network that pulls may take
_LATE = 0.05  # share of a mean answer's time (its TPOT target times its tokens) that a pull may take


def low_affinity(costs: Costs, cluster: Cluster, demand: Demand, rate: float | None) -> tuple[bool, str]:
    """(whether KV must stay inside nodes, why). High affinity (Algorithm 1) where both hold on the slow link:

    - a mean request's pull takes at most a twentieth of what its answer may take (TPOT target times its tokens), and
    - pulls of all requests at `rate`, all between nodes, take at most half of the nodes' bandwidth. Without a rate
      (as many as possible) a request/s for each pair of devices is taken, about what a large model attains.
    """
    if cluster.nodes == 1:
        return False, "there is one node"
    size = demand.workload.mean_prompt_tokens * kv_token_bytes(costs.spec, dtype=costs.dtype)
    link = Links(cluster).efficiency * cluster.inter_node_bandwidth
    pull = cluster.inter_node_latency + size / link
    offered = rate if rate is not None else cluster.num_devices / 2
    busy = offered * size / (link * cluster.nodes)
    targets = [slo.tpot for app in demand.apps if (slo := demand.targets.of(app)).tpot is not None]
    allowed = _LATE * min(targets) * demand.workload.mean_output_tokens if targets else float("inf")
    facts = f"a mean request's KV ({size / 1e6:.0f} MB) takes {pull:.3g} s between nodes"
    if pull > allowed:
        return True, f"{facts}, more than the {allowed:.2g} s that its TPOT target leaves for it"
    if busy > _BUSY:
        return True, f"{facts}: {offered:g} requests/s would take {busy:.0%} of the network"
    return False, f"{facts}, {busy:.0%} of the network at {offered:g} requests/s"


def network_bound(costs: Costs, cluster: Cluster, demand: Demand, plan: Plan, enough: float = 0.0) -> float:
    """Requests/s whose KV the links of a seated plan can move, where each decode instance takes as many as the others
    from each prefill instance: a router that does not know nodes spreads them so. Infinite without pulls. A bound that
    is below `enough` may be a little too high."""
    links = Links(cluster)
    size = demand.pulled_tokens * kv_token_bytes(costs.spec, dtype=costs.dtype)
    prefill, decode = (_alike(plan, role) for role in (Role.PREFILL, Role.DECODE))
    crossing = max(_crossing(prefill, decode), _crossing(decode, prefill))
    if crossing and size and (bound := links.efficiency * cluster.inter_node_bandwidth / (size * crossing)) < enough:
        return bound
    pairs = sum(number for _, number in prefill) * sum(number for _, number in decode)
    seconds: dict[Link, float] = {}  # of each link, for a request
    for one, ones in prefill:
        for other, others in decode:
            number = {"send": others, "receive": ones}  # on a device's own link; a node's is everybody's
            for link, share in links.route(costs.spec, one, other).loads:
                pulls = number.get(link[0], ones * others) / pairs
                seconds[link] = seconds.get(link, 0.0) + share * size * pulls / links.capacity(link)
    return 1 / max(seconds.values(), default=0.0) if seconds and size else float("inf")


def _alike(plan: Plan, role: Role) -> list[tuple[Seats, int]]:
    """One of each kind of the role's instances that sit in the same nodes, and how many there are: their devices' links
    are loaded alike."""
    kinds: dict[tuple[int, int, tuple[str, ...]], list[Seats]] = {}
    for replica in plan.replicas():
        if replica.role is role:
            seats = Seats(replica.devices, replica.spec.tp, replica.spec.pp)
            kinds.setdefault((seats.tp, seats.pp, tuple(map(node_of, seats.devices))), []).append(seats)
    return [(seats[0], len(seats)) for seats in kinds.values()]


def _crossing(ones: list[tuple[Seats, int]], others: list[tuple[Seats, int]]) -> float:
    """The least share of a request's KV that leaves (or enters) the busiest node of `ones`: of those that sit in one
    node, all that moves to instances that have no device there."""
    inside: dict[str, int] = {}
    beside: dict[str, int] = {}
    for seats, number in ones:
        nodes = set(map(node_of, seats.devices))
        if len(nodes) == 1:
            node = nodes.pop()
            inside[node] = inside.get(node, 0) + number
    for seats, number in others:
        for node in set(map(node_of, seats.devices)):
            beside[node] = beside.get(node, 0) + number
    of_ones, of_others = (sum(number for _, number in each) for each in (ones, others))
    shares = [count / of_ones * (1 - beside.get(node, 0) / of_others) for node, count in inside.items()]
    return max(shares, default=0.0)
