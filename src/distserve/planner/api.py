"""The search and the simulator as two functions, for programs: values or names in, an answer out. Knows no screen.

from distserve import plan
answer = plan(model="facebook/opt-13b", cluster="a100-1x8", workload="sharegpt", rate=8, slo="ttft=0.25,tpot=0.1")
answer.prefill.tp, answer.decode.tp, answer.ratio, answer.goodput.rate, answer.plan.to_toml()
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from distserve.catalogue import model_spec
from distserve.cluster import Cluster
from distserve.costs.base import Costs
from distserve.costs.choose import choose_costs
from distserve.errors import UsageError
from distserve.metrics import SLO, Report, Targets
from distserve.plan import Plan
from distserve.planner.answer import Answer, Dedicated
from distserve.planner.choose import Wish, choose
from distserve.planner.demand import GOAL, Demand
from distserve.sim.simulate import simulate as simulate_with
from distserve.workload import Workload

SHAPE = "sharegpt"  # whose lengths are stretched to means


def plan(
    model: str,
    cluster: Cluster | str | Path,
    workload: Workload | str | Path | None = None,
    *,
    rate: float | None = None,
    slo: SLO | Targets | str | Iterable[str] | None = None,
    devices: int | None = None,
    attainment: float = GOAL,
    algorithm: str = "auto",
    costs: Costs | str | Path | None = None,
    cv: float = 1.0,
    seed: int = 0,
    jobs: int = 1,
    avg_input_length: float | None = None,
    avg_output_length: float | None = None,
    arrival_rate: float | None = None,
    ttft_slo: float | None = None,
    tpot_slo: float | None = None,
) -> Answer | Dedicated:
    """The placement with the fewest devices that meets `slo` for the share `attainment` of the requests at `rate`
    requests/s; without a rate, the one with the highest goodput of the cluster (of `devices` of it at most).

    The workload is a name, a file, a `Workload`, or its means: `avg_input_length` and `avg_output_length` tokens. Means
    alone say nothing of tails, which decide an attainment: lengths then have the shape of the ShareGPT conversations,
    stretched so that their means are these. `arrival_rate` is `rate`, `ttft_slo` and `tpot_slo` (seconds) are `slo`,
    in other words. `jobs`: processes.

    Raises `UsageError` where the question makes no sense, `InfeasibleError` where no deployment meets the targets: it
    names the nearest that one does."""
    cluster_name = cluster.device if isinstance(cluster, Cluster) else str(cluster)
    if not isinstance(cluster, Cluster):
        cluster = Cluster.load(cluster)
    lengths = _workload(workload, avg_input_length, avg_output_length)
    lengths = lengths.clipped(model_spec(model).max_model_len)
    targets = _targets(slo, ttft_slo, tpot_slo)
    if rate is not None and arrival_rate is not None:
        raise UsageError("rate and arrival_rate are both given, and mean the same: keep one")
    wish = Wish(
        model=model,
        cluster=cluster,
        demand=Demand(lengths, targets, attainment, cv, seed),
        rate=rate if arrival_rate is None else arrival_rate,
        max_devices=devices,
        algorithm=algorithm,
        cluster_name=cluster_name,
        jobs=jobs,
    )
    return choose(wish, _costs(costs, model, cluster.device))


def simulate(
    plan: Plan | str | Path,
    workload: Workload | str | Path,
    *,
    slo: SLO | str | None = None,
    rate: float | None = None,
    requests: int = 2000,
    seed: int = 0,
    cv: float = 1.0,
    model: str | None = None,
    cluster: Cluster | str | Path | None = None,
    costs: Costs | str | Path | None = None,
    warmup: float | None = None,
) -> Report:
    """What `distserve bench` would report of the plan under the workload: drawn at `rate` requests/s, or replayed where
    it has arrival times and no rate is given. `model`: where the plan names none. Raises `UsageError`."""
    if not isinstance(plan, Plan):
        plan = Plan.load(plan)
    name = model or plan.model
    if name is None:
        raise UsageError("the plan names no model: give model, such as facebook/opt-13b")
    if cluster is not None and not isinstance(cluster, Cluster):
        cluster = Cluster.load(cluster)
    device = plan.device or (cluster.device if cluster else None)
    if device is None and isinstance(costs, str | Path | None):
        raise UsageError("the plan names no device: give a cluster, or device in the plan, such as a100-80g")
    lengths = _workload(workload, None, None)
    if rate is not None:
        lengths = lengths.draw(rate, requests, seed=seed, cv=cv)
    target = SLO.parse(slo) if isinstance(slo, str) else slo or SLO()
    known = _costs(costs, name, device or "")
    drawn = seed if rate is not None else None
    return simulate_with(plan, lengths, known, slo=target, cluster=cluster, warmup=warmup, seed=drawn)


def _workload(workload: Workload | str | Path | None, prompt: float | None, output: float | None) -> Workload:
    if workload is not None:
        if prompt is not None or output is not None:
            raise UsageError("workload and avg_input_length or avg_output_length are both given: keep one")
        return workload if isinstance(workload, Workload) else Workload.load(workload)
    if prompt is None or output is None:
        raise UsageError("give a workload (a name or a file), or both avg_input_length and avg_output_length")
    for name, mean in (("avg_input_length", prompt), ("avg_output_length", output)):
        if not 1 <= mean < float("inf"):
            raise UsageError(f"{name} = {mean:g} must be at least 1 token")
    shape = Workload.load(SHAPE)
    return shape.scaled(prompt / shape.mean_prompt_tokens, output / shape.mean_output_tokens)


def _targets(slo: SLO | Targets | str | Iterable[str] | None, ttft: float | None, tpot: float | None) -> Targets:
    if slo is not None:
        if ttft is not None or tpot is not None:
            raise UsageError("slo and ttft_slo or tpot_slo are both given: keep one")
        if isinstance(slo, Targets):
            return slo
        if isinstance(slo, SLO):
            return Targets(slo)
        return Targets.parse([slo] if isinstance(slo, str) else slo)
    if ttft is None and tpot is None:
        raise UsageError("give the targets: slo='ttft=0.25,tpot=0.1', or ttft_slo and tpot_slo in seconds")
    return Targets(SLO(ttft, tpot))


def _costs(costs: Costs | str | Path | None, model: str, device: str) -> Costs:
    if costs is None or isinstance(costs, str | Path):
        return choose_costs(model, device, costs)
    return costs
