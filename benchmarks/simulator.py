"""How fast the simulator is: requests a second of processor time, how that grows with their number, and how it compares
with upstream's event loop on the same case.

    python -m benchmarks.simulator [--requests 20000] [--rate 4.5]

The case is the one upstream publishes figures for: OPT-13B on A100s, prefill tp 2, decode tp 1, ShareGPT lengths at 4.5
requests/s. Its event loop takes 0.46 s of processor time for 1,000 requests, 1.4 s with its post-processing (LLMServe/
DistServe, simdistserve, commit 82831f1, measured on a machine of this kind). Ours is timed whole: requests in, records
out, and once more with every step taken one by one.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass

from distserve.costs.base import Costs
from distserve.costs.choose import choose_costs
from distserve.plan import InstanceSpec, Plan, Policy, Role
from distserve.sched.continuous import ContinuousScheduler
from distserve.sim.simulate import imagine
from distserve.workload import Workload

UPSTREAM = {"event loop": 0.46, "with post-processing": 1.4}  # seconds of processor time for 1,000 requests


@dataclass(frozen=True)
class Case:
    name: str
    plan: Plan
    costs: Costs
    rate: float


def cases(rate: float) -> list[Case]:
    opt13, opt66 = (choose_costs(f"facebook/opt-{size}b", "a100-80g") for size in (13, 66))
    vllm = choose_costs("facebook/opt-13b", "a100-80g", "a100-80g-vllm")
    pair = Plan((InstanceSpec(Role.PREFILL, tp=2), InstanceSpec(Role.DECODE)))
    staged = Plan((InstanceSpec(Role.PREFILL, tp=4), InstanceSpec(Role.DECODE, tp=2, pp=2)))
    eight = Plan((InstanceSpec(Role.PREFILL, tp=2, count=4), InstanceSpec(Role.DECODE, count=8)))
    colocated = Plan((InstanceSpec(Role.COLOCATED, policy=Policy.PREFILL_FIRST),))
    return [
        Case("opt-13b, prefill tp 2, decode tp 1", pair, opt13, rate),
        Case("the same at half the rate", pair, opt13, rate / 2),
        Case("four prefill, eight decode", eight, opt13, 5 * rate),
        Case("opt-66b, prefill tp 4, decode tp 2 pp 2", staged, opt66, 2.0),
        Case("opt-13b colocated, whole prompts", colocated, vllm, 1.0),
    ]


def seconds(case: Case, requests: int) -> float:
    """Of processor time."""
    workload = Workload.load("sharegpt").draw(case.rate, requests)
    gc.collect()
    began = time.process_time()
    imagine(case.plan, workload, case.costs)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--rate", type=float, default=4.5)
    args = parser.parse_args()
    seconds(cases(args.rate)[0], 500)  # warm
    for case in cases(args.rate):
        requests = args.requests
        took = seconds(case, requests)
        print(f"{case.name:<42}{requests:>7} requests {took:6.2f} s  {took / requests * 1e6:6.0f} us a request")
    pair = cases(args.rate)[0]
    small, large = seconds(pair, args.requests // 8), seconds(pair, args.requests)
    print(f"eight times the requests take {large / small:.1f} times as long (8.0 is linear)")
    for name, upstream in UPSTREAM.items():
        print(f"upstream's {name}: {upstream * args.requests / 1000 / large:.0f} times as long")
    repeats = ContinuousScheduler.repeats
    ContinuousScheduler.repeats = lambda self, batch: 1  # type: ignore[method-assign]
    try:
        one_by_one = seconds(pair, args.requests)
    finally:
        ContinuousScheduler.repeats = repeats  # type: ignore[method-assign]
    print(f"every step by itself: {one_by_one:.2f} s, {one_by_one / large:.2f} times as long")


if __name__ == "__main__":
    main()
