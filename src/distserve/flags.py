"""Options that several commands have, said once: a load, an engine, and where reports go. Knows no command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

WorkloadName = Annotated[
    str,
    typer.Option(
        "--workload",
        "-w",
        metavar="NAME|FILE",
        help="Lengths of prompts and answers: sharegpt, humaneval, longbench, or a CSV, JSONL, Mooncake or Azure "
        "trace file (docs/reference/workload.md).",
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(
        metavar="R",
        help="Draw arrivals at R requests a second. A file that has arrival times needs none: it is replayed.",
    ),
]
Cv = Annotated[
    float,
    typer.Option(
        metavar="CV",
        help="Coefficient of variation of the gaps: 1 is Poisson, above it bursts (gamma), 0 is fixed.",
    ),
]
Warmup = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="Requests that arrive earlier than this load the instances but count for nothing.  "
        "[default: a tenth of a drawn run; 0 when a file is replayed]",
    ),
]
Seed = Annotated[int, typer.Option(metavar="S", help="Same seed, same arrivals, lengths and prompts.")]
Device = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda", help="What computes; auto takes the GPUs where there are any.")
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="auto|bfloat16|float16|float32",
        help="Type of weights and KV; auto takes the checkpoint's (GGUF: bfloat16).",
    ),
]
BlockSize = Annotated[int, typer.Option(metavar="16|32|64", help="Tokens in a block of KV.")]
JsonOut = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write the report as JSON; - is stdout.")]
RequestsOut = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a CSV row for each request.")]
