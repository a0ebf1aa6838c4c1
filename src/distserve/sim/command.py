"""`distserve simulate`: what it asks for. What it does is `run.run`, imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distserve.flags import Cv, JsonOut, Rate, RequestsOut, Warmup, WorkloadName


def simulate(
    plan: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Which instances serve which model: a TOML file (docs/reference/plan.md)."),
    ],
    workload: WorkloadName = "sharegpt",
    rate: Rate = None,
    cv: Cv = 1.0,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests",
            "-n",
            metavar="N",
            help="How many to simulate.  [default: five minutes' worth, at least 1000; a replayed file whole]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Same seed, same arrivals and lengths.")] = 0,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TARGETS",
            help="What a request must meet: ttft=0.25,tpot=0.1 (seconds) or ttft=250ms. Repeat it with a name in front "
            "for a workload of several applications: chat:ttft=0.25.  [default: none, every complete answer counts]",
        ),
    ] = None,
    goal: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Exit with status 1 when fewer than this share of the requests meet the targets, as in 0.9.",
        ),
    ] = None,
    warmup: Warmup = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Goes before the plan's model.")] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the device catalogue; goes before the plan's device."),
    ] = None,
    costs: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="What steps take: shipped costs (docs/reference/costs.md) or a file.  [default: those shipped for the "
            "model and device, else an estimate from the device's datasheet]",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="How the devices are connected (docs/reference/cluster.md).  [default: nodes of eight as their vendor "
            "builds them]",
        ),
    ] = None,
    json_out: JsonOut = None,
    requests_out: RequestsOut = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw TTFT, TPOT and attainment over time, as .png or .svg (extra: plots)."),
    ] = None,
) -> None:
    """Predict what a plan attains, without a device.

    The very schedulers of the server are driven in imagined time, with step times from measured costs or from the
    device's datasheet; thousands of requests take seconds. The report is the one that `distserve bench` gives of the
    real thing.

    \b
    Examples:
      distserve simulate --plan plan.toml --rate 4 --slo ttft=0.25,tpot=0.1
      distserve simulate --plan plan.toml --workload trace.jsonl --slo ttft=1,tpot=0.05 --json -
      distserve simulate --plan plan.toml --rate 8 --costs a100-80g-vllm --plot latencies.svg
    """
    from distserve.sim.run import Options, run

    raise typer.Exit(
        run(
            Options(
                plan=plan,
                workload=workload,
                rate=rate,
                cv=cv,
                requests=requests,
                seed=seed,
                slo=tuple(slo or ()),
                goal=goal,
                warmup=warmup,
                model=model,
                device=device,
                costs=costs,
                cluster=cluster,
                json_out=json_out,
                requests_out=requests_out,
                plot=plot,
            )
        )
    )
