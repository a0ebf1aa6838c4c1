"""`distserve validate`: what it asks for. What it does is `run.run`, imported when it runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from distserve.bench.options import parse_numbers
from distserve.flags import Seed
from distserve.metrics import SLO
from distserve.validate.options import ValidateOptions


def validate(
    costs: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="What steps take on this machine: what `distserve profile` wrote."),
    ] = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Which instances to start: 1p1d, 2c-whole, 2c-chunked, or a plan file. Repeat it for several.  "
            "[default: these three]",
        ),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            "--workload",
            "-w",
            metavar="W[:P[,A]]",
            help="A workload as simulate and bench take it, lengths of prompts times P and of answers times A. Repeat "
            "it for several.  [default: sharegpt:0.25, humaneval:0.5,1.5 and longbench:0.5,0.15]",
        ),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            help="Requests a second.  [default: five for each plan and workload, around the knee that the simulator "
            "expects]",
        ),
    ] = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TARGETS",
            help="ttft=0.25,tpot=0.1 (seconds) or ttft=250ms. Repeat it for several: all judge the same runs.  "
            "[default: a tight one and a loose one, from what an idle system takes]",
        ),
    ] = None,
    goal: Annotated[
        float, typer.Option(metavar="SHARE", help="Of requests within the targets, at a plan's capacity.")
    ] = 0.9,
    duration: Annotated[float, typer.Option(metavar="SECONDS", help="Of arrivals, each run.")] = 60.0,
    requests: Annotated[
        int | None, typer.Option("--requests", "-n", metavar="N", help="Of each run, in place of --duration.")
    ] = None,
    repeats: Annotated[
        int, typer.Option(metavar="N", help="Measure every run so often: the same requests again, which shows noise.")
    ] = 1,
    seed: Seed = 0,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="As `distserve serve` takes it; goes before the plan's.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Load a server that runs already, with the instances of the one --plan."),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep every run in this file as it ends. Runs that are in it are not measured again: the same command "
            "goes on where it was stopped.",
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Compare what --record kept; measure nothing."),
    ] = None,
    time: Annotated[
        float, typer.Option(metavar="SECONDS", help="Measure no longer than this; what is left, another time.")
    ] = math.inf,
    within: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Exit with status 1 when attainment is missed by more in the mean: 0.02."),
    ] = None,
    json_out: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write everything as JSON; - is stdout.")
    ] = None,
    requests_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a CSV row for each request, of both worlds.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw both worlds, as .png or .svg (extra: plots).")
    ] = None,
) -> None:
    """Compare the simulator with the live server, on the same requests.

    Starts a server for each plan, sends it the requests of each workload at rates around its knee, imagines the very
    same requests with this machine's costs, and shows predicted beside measured: attainment, latencies, capacity.

    \b
    Examples:
      distserve profile -o costs.json && distserve validate --costs costs.json --record runs.jsonl
      distserve validate --costs costs.json --from runs.jsonl --plot runs.svg
      distserve validate --costs costs.json --plan plan.toml -w sharegpt:0.25 --rates 1,2,3 --slo ttft=1,tpot=0.1
      distserve validate --costs costs.json --plan plan.toml --url http://127.0.0.1:8000 --repeats 3
    """
    options = ValidateOptions(
        costs=costs,
        plans=tuple(plan or ()),
        workloads=tuple(workload or ()),
        rates=parse_numbers("--rates", rates) if rates is not None else (),
        slos=tuple(map(SLO.parse, slo or ())),
        goal=goal,
        duration=duration,
        requests=requests,
        repeats=repeats,
        seed=seed,
        model=model,
        url=url,
        record=record,
        source=source,
        time=time,
        within=within,
        json_out=json_out,
        requests_out=requests_out,
        plot=plot,
    )
    from distserve.validate.run import run

    raise typer.Exit(run(options))
