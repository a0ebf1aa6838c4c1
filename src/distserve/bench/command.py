"""`distserve bench`: what it asks for. What it does is `run.run`, imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distserve.bench.options import BenchOptions, parse_numbers
from distserve.flags import Cv, JsonOut, Rate, RequestsOut, Seed, Warmup, WorkloadName


def bench(
    url: Annotated[str, typer.Option(metavar="URL", help="The server, with or without /v1.")] = "http://127.0.0.1:8000",
    workload: WorkloadName = "sharegpt",
    rate: Rate = None,
    rates: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="One run after the other at each of these rates, and the goodput."),
    ] = None,
    find_goodput: Annotated[
        bool,
        typer.Option(
            "--find-goodput",
            help="Search for the highest rate at which the goal is met in steady state (--slo, --goal); --rate is "
            "where to begin, else 1.",
        ),
    ] = False,
    cv: Cv = 1.0,
    fixed: Annotated[bool, typer.Option("--fixed", help="Evenly spaced arrivals; the same as --cv 0.")] = False,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests",
            "-n",
            metavar="N",
            help="How many to offer.  [default: a minute's worth, at least 100; a replayed file whole]",
        ),
    ] = None,
    seed: Seed = 0,
    slo: Annotated[
        str | None,
        typer.Option(
            metavar="TARGETS",
            help="What a request must meet: ttft=0.25,tpot=0.1 (seconds) or ttft=250ms.  "
            "[default: none, every complete answer counts]",
        ),
    ] = None,
    goal: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Exit with status 1 when fewer than this share of the requests meet the targets, as in 0.9; also the "
            "goal of a goodput, which is 0.9 unless given.",
        ),
    ] = None,
    warmup: Warmup = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of the server's models.  [default: its first]")
    ] = None,
    endpoint: Annotated[
        str, typer.Option(metavar="completions|chat", help="/v1/completions or /v1/chat/completions.")
    ] = "completions",
    prompts: Annotated[
        str,
        typer.Option(
            metavar="auto|ids|text",
            help="Send token ids (exact lengths; completions only) or text (exact where the server can count it).",
        ),
    ] = "auto",
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Cut prompts out of this text.  [default: random tokens]"),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="DISTSERVE_API_KEY", help="The server's key.")
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            help="Ask for answers of exactly the workload's length (ignore_eos), or let the model end its answers."
        ),
    ] = True,
    scale: Annotated[
        str | None,
        typer.Option(
            metavar="P[,O]", help="Multiply the lengths of prompts by P and of answers by O (O = P where left out)."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", help="Cut requests that are longer.  [default: what /v1/models says]"),
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="A request that takes longer has failed.")] = 600.0,
    devices: Annotated[
        int | None, typer.Option(metavar="N", help="How many devices serve, for the rate per device.")
    ] = None,
    json_out: JsonOut = None,
    requests_out: RequestsOut = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw TTFT, TPOT, requests in flight and, of several rates, attainment: .png or .svg (extra: plots).",
        ),
    ] = None,
) -> None:
    """Measure an OpenAI server under load: TTFT, TPOT, attainment.

    The load is open: requests arrive when they arrive, however slow the server is, and latencies count from the
    scheduled arrival. Attainment is the share of all offered requests that meet the targets; refused and failed ones
    meet nothing. Ctrl-C stops early and reports what was measured.

    \b
    Examples:
      distserve bench --workload humaneval --rate 2 --slo ttft=0.5,tpot=0.1
      distserve bench --rates 1,2,4,8 --slo ttft=250ms,tpot=100ms --goal 0.9 --json sweep.json
      distserve bench --find-goodput -w humaneval --slo ttft=250ms,tpot=100ms --plot goodput.svg
      distserve bench --workload trace.jsonl --url http://server:8000 --requests-out requests.csv
      distserve bench --rate 4 --fixed --scale 0.25 -n 500 --json -
    """
    options = BenchOptions(
        url=url,
        workload=workload,
        rates=parse_numbers("--rates", rates) if rates is not None else (rate,) if rate is not None else (),
        both_rates=rate is not None and rates is not None,
        find_goodput=find_goodput,
        cv=0.0 if fixed else cv,
        requests=requests,
        seed=seed,
        slo=slo,
        goal=goal,
        warmup=warmup,
        model=model,
        endpoint=endpoint,
        prompts=prompts,
        text=text,
        api_key=api_key,
        ignore_eos=ignore_eos,
        scale=parse_numbers("--scale", scale) if scale is not None else (),
        context=context,
        timeout=timeout,
        devices=devices,
        json_out=json_out,
        requests_out=requests_out,
        plot=plot,
    )
    from distserve.bench.run import run

    raise typer.Exit(run(options))
