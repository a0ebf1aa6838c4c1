"""`distserve profile`: what it asks for. What it does is `run.run`, imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from distserve.flags import BlockSize, Device, Dtype


def profile(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder in Hugging Face layout, a .gguf file, a hub id, or the built-in alias "
            "smollm2-135m-instruct: whatever `distserve serve` takes.",
        ),
    ] = "smollm2-135m-instruct",
    out: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE|-", help="Write the costs file; - is stdout.")
    ] = "costs.json",
    tp: Annotated[int, typer.Option(metavar="N", help="Tensor parallelism of the instance that is measured.")] = 1,
    pp: Annotated[int, typer.Option(metavar="N", help="Pipeline parallelism.")] = 1,
    add: Annotated[
        bool,
        typer.Option(
            "--add",
            help="Add this parallelism to FILE where that is there, of the same machine, model and dtype. Only steps "
            "are measured then; the rest of the file stays.",
        ),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kv_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE|SIZE",
            help="KV cache of each instance, as in `distserve serve`.  [default: 1GiB on a CPU; what the weights leave "
            "of a GPU]",
        ),
    ] = None,
    block_size: BlockSize = 32,
    longest: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", help="Longest prompt and context that are timed.  [default: 2048, or the model's context]"
        ),
    ] = None,
    time: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to measure at most, loading not counted.")
    ] = 160.0,
    live: Annotated[
        bool,
        typer.Option(
            "--live/--no-live",
            help="Start a server and measure what a request and a token cost around the engine, or leave that out.",
        ),
    ] = True,
) -> None:
    """Measure this machine: what steps of the model cost here, for `simulate` and `plan`.

    The engine itself computes prompts and decode steps of many sizes, as often as the machine is noisy; pulls between
    two instances, steps beside a busy neighbour, and a live server around it all are measured, too. Ctrl-C keeps what
    is there. Leave the machine alone meanwhile.

    \b
    Examples:
      distserve profile                                      # the demo model -> costs.json
      distserve profile ./my-model -o my-costs.json --time 300
      distserve profile --tp 2 --add                         # and instances of two ranks, into the same file
      distserve simulate --plan plan.toml --costs costs.json --rate 2
      distserve plan --model smollm2-135m-instruct --cluster local --costs costs.json -w sharegpt --slo ttft=1,tpot=0.1
    """
    from distserve.profiler.run import Options, run

    raise typer.Exit(
        run(
            Options(
                model=model,
                out=out,
                tp=tp,
                pp=pp,
                device=device,
                dtype=dtype,
                kv_memory=kv_memory,
                block_size=block_size,
                longest=longest,
                time=time,
                live=live,
                add=add,
            )
        )
    )
