"""`distserve plan`: what it asks for. What it does is `run.run`, imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    model: Annotated[
        str, typer.Option(metavar="NAME", help="The model: a hub id such as facebook/opt-66b, or a folder.")
    ],
    cluster: Annotated[
        str, typer.Option(metavar="FILE|NAME", help="The devices and their links: a file, or a name such as a100-4x8.")
    ],
    workload: Annotated[
        str,
        typer.Option(
            "--workload",
            "-w",
            metavar="NAME|FILE",
            help="Lengths of prompts and answers: sharegpt, humaneval, longbench, or a file "
            "(docs/reference/workload.md).",
        ),
    ],
    slo: Annotated[
        list[str],
        typer.Option(
            metavar="TARGETS",
            help="What a request must meet: ttft=0.25,tpot=0.1 (seconds) or ttft=250ms. Once for each application of "
            "the workload with its name before: chat:ttft=0.25,tpot=0.1.",
        ),
    ],
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="Requests a second to be met with the fewest devices.  [default: as many as the devices can]",
        ),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(metavar="G", help="Use at most G devices.  [default: the whole cluster]")
    ] = None,
    attainment: Annotated[
        float, typer.Option(metavar="SHARE", help="The share of the requests that must meet the targets.")
    ] = 0.9,
    algorithm: Annotated[
        str,
        typer.Option(
            metavar="auto|high|low",
            help="high: KV may move between nodes; low: it stays inside them; auto: as the links allow.",
        ),
    ] = "auto",
    costs: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="How long steps take: a shipped name or a costs file.  [default: measured ones, else an estimate]",
        ),
    ] = None,
    cv: Annotated[
        float, typer.Option(metavar="CV", help="Coefficient of variation of the gaps between arrivals: 1 is Poisson.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="S", help="Same seed, same arrivals and lengths, same plan.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the plan, for serve and simulate.")
    ] = None,
    json_out: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write the answer as JSON; - is stdout.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw attainment against rate and against SLO scale (.png or .svg)."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", metavar="N", help="Processes.  [default: one for each core]")
    ] = None,
) -> None:
    """Choose the placement with the highest goodput: how prefill and decode are split and on which devices.

    Simulated, not served: no GPU is needed. The answer meets the targets for the asked share of the requests in steady
    state, with the fewest devices, or is no answer: then the exit status is 1 and the nearest targets that can be met
    are named.

    \b
    Examples:
      distserve plan --model facebook/opt-13b --cluster a100-1x8 -w sharegpt --rate 10 --slo ttft=0.25,tpot=0.1
      distserve plan --model facebook/opt-66b --cluster a100-4x8 -w longbench --slo ttft=15,tpot=0.15 -o plan.toml
      distserve plan --model Qwen/Qwen3-32B --cluster h100-2x8 -w trace.csv --rate 30 \\
          --slo chat:ttft=0.3,tpot=0.05 --slo summarize:ttft=5,tpot=0.1 --json -
    """
    from distserve.planner.run import Options, run

    raise typer.Exit(
        run(
            Options(
                model=model,
                cluster=cluster,
                workload=workload,
                slo=tuple(slo),
                rate=rate,
                devices=devices,
                attainment=attainment,
                algorithm=algorithm,
                costs=costs,
                cv=cv,
                seed=seed,
                out=out,
                json_out=json_out,
                plot=plot,
                jobs=jobs,
            )
        )
    )
