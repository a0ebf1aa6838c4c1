"""How fast the simulator is: requests a second of processor time, how that grows with their number, and how it compares
with upstream's event loop on the same case.

    python -m benchmarks.simulator [--requests 20000] [--rate 4.5] [--upstream CHECKOUT [--upstream-python PATH]]

The case is the one upstream publishes figures for: OPT-13B on A100s, prefill tp 2, decode tp 1, ShareGPT lengths at 4.5
requests/s. With `--upstream`, a checkout of LLMServe/DistServe, its simulator gets the same requests at the same times
in the same run, and its processor time is compared with ours (`simulator_upstream.py`; the interpreter needs simpy,
numpy and pandas). Without, the figures are those that it was once measured at: 0.46 s for 1,000 requests, 1.4 s with
its post-processing (commit 82831f1, on another machine). Ours is timed the same two ways: the world from its first
request to its last, and that with the records and the report of them. Once more it is timed with every step taken one
by one, and as the interpreter runs it, each in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from distserve import compiled
from distserve.costs.base import Costs
from distserve.costs.choose import choose_costs
from distserve.plan import InstanceSpec, Plan, Policy, Role
from distserve.sched.continuous import ContinuousScheduler
from distserve.sim.simulate import imagine, summarize
from distserve.workload import Workload

UPSTREAM = {"event loop": 0.46, "with post-processing": 1.4}  # seconds of processor time for 1,000 requests, once
ROUNDS = 5  # that both take turns for
UPSTREAM_REQUESTS = 2000  # some seconds' work for it


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


def seconds(case: Case, requests: int) -> tuple[float, float]:
    """Of processor time: (until the last request is over, until its report is there)."""
    workload = Workload.load("sharegpt").draw(case.rate, requests)
    gc.collect()
    began = time.process_time()
    run = imagine(case.plan, workload, case.costs)
    over = time.process_time() - began
    summarize(run, case.plan, workload)
    return over, time.process_time() - began


def lived(case: Case, requests: int) -> float:
    """Only until the last request is over."""
    return seconds(case, requests)[0]


def one_by_one(case: Case, requests: int) -> float:
    """The same, with every step by itself. In the interpreter: compiled methods cannot be replaced."""
    ContinuousScheduler.repeats = lambda self, batch: 1  # type: ignore[method-assign]
    return lived(case, requests)


def interpreted(what: str, requests: int, rate: float) -> float:
    """Seconds of a function of this module, in another process."""
    case = f"cases({rate})[0]"
    code = f"from benchmarks.simulator import *; seconds({case}, 500); print({what}({case}, {requests}))"
    environment = os.environ | {compiled.OFF: "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def upstream(python: str, checkout: Path, rate: float) -> dict[str, float]:
    """Its seconds of processor time for 1,000 requests."""
    workload = Workload.load("sharegpt").draw(rate, UPSTREAM_REQUESTS)
    asked = json.dumps([[r.arrival, r.prompt_tokens, r.output_tokens] for r in workload])
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("simulator_upstream.py")
    done = subprocess.run([python, script], input=asked, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"upstream's simulator failed: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: found[name] * 1000 / UPSTREAM_REQUESTS for name in UPSTREAM}


def beside(pair: Case, requests: int, args: argparse.Namespace) -> None:
    """Both simulators in turns, the best of each."""
    ours, theirs = [], []
    for _ in range(ROUNDS):
        ours += [seconds(pair, requests) for _ in range(3)]
        if args.upstream is not None:
            theirs.append(upstream(args.upstream_python, args.upstream, args.rate))
    where = "in this run" if theirs else "on another machine"
    for number, (name, once) in enumerate(UPSTREAM.items()):
        taken = min([each[name] for each in theirs], default=once)
        mine = min(each[number] for each in ours) * 1000 / requests
        said = f"{taken:.2f} s for 1,000 requests, ours {1e3 * mine:.2f} ms"
        print(f"upstream's {name}, {where}: {said}: {taken / mine:.0f} times as long")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--rate", type=float, default=4.5)
    parser.add_argument("--upstream", type=Path, metavar="CHECKOUT", help="of LLMServe/DistServe, to be timed beside")
    parser.add_argument("--upstream-python", default=sys.executable, metavar="PATH", help="interpreter with simpy")
    args = parser.parse_args()
    requests = args.requests
    print("compiled" if compiled.in_use() else f"interpreted ({compiled.notice()})")
    seconds(cases(args.rate)[0], 500)  # warm
    for case in cases(args.rate):
        over, whole = seconds(case, requests)
        each = f"{over / requests * 1e6:5.1f} us a request, {whole / requests * 1e6:5.1f} with its report"
        print(f"{case.name:<42}{requests:>7} requests {over:6.2f} s  {each}")
    pair = cases(args.rate)[0]
    small, _ = seconds(pair, requests // 8)
    large = min(lived(pair, requests) for _ in range(3))
    print(f"eight times the requests take {large / small:.1f} times as long (8.0 is linear)")
    beside(pair, requests, args)
    plain = interpreted("lived", requests // 4, args.rate)
    print(f"interpreted: {plain / (requests // 4) * 1e6:.0f} us a request, {4 * plain / large:.1f} times as long")
    single = interpreted("one_by_one", requests // 4, args.rate)
    print(f"interpreted, every step by itself: {single / plain:.2f} times as long as in closed form")


if __name__ == "__main__":
    main()
