"""`distserve serve`: what it asks for. What it does is `launch.serve`, imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distserve.errors import UsageError
from distserve.flags import BlockSize, Device, Dtype
from distserve.plan import parse_memory
from distserve.serve.options import ServeOptions


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A folder in Hugging Face layout (config.json, *.safetensors), a .gguf file, a hub id such as "
            "meta-llama/Llama-3.1-8B (downloaded once), or the built-in alias smollm2-135m-instruct. "
            "Goes before the plan's model.  [default: smollm2-135m-instruct]",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Which instances to start, with which role, parallelism and devices: a TOML file "
            "(docs/reference/plan.md).  [default: one prefill and one decode instance]",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0 opens it to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", help="0 takes any free port.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            envvar="DISTSERVE_API_KEY",
            help="Ask clients for this key (Authorization: Bearer KEY). Repeat it for several; in the environment, "
            "where other users of the machine cannot read it, separate them by spaces.",
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="What clients call the model. Repeat it for several.  [default: MODEL as given]"
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", help="Longest prompt and answer together.  [default: the checkpoint's context]"),
    ] = None,
    kv_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE|SIZE",
            help="KV cache of each instance: a share of the device's memory (0.2, 20%) or a size (2GiB). "
            "[default: 1GiB on a CPU; what the weights leave of a GPU]",
        ),
    ] = None,
    block_size: BlockSize = 32,
    transport: Annotated[
        str,
        typer.Option(
            metavar="auto|shm|nixl",
            help="How decode instances pull KV: through shared memory, or over NIXL as between hosts. auto takes "
            "shared memory, for all instances are on this host.",
        ),
    ] = "auto",
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Prefill takes waiting prompts together up to this many tokens: about as many as saturate the device, "
            "for beyond that a batch only delays its first.  [default: measured at start]",
        ),
    ] = None,
    max_queue: Annotated[
        int | None,
        typer.Option(
            metavar="REQUESTS",
            help="Requests admitted and not yet finished; more are refused at once with 429 and a Retry-After, so that "
            "those inside keep their latency.  [default: 2048]",
        ),
    ] = None,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="How long running requests may go on after SIGTERM or Ctrl-C; a second Ctrl-C ends them.",
        ),
    ] = 30.0,
    awake: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="On a CPU: for so long after its last work an instance spins on its cores, at the lowest priority, "
            "because the host of a virtual machine lends idle cores to others; 0 lets them sleep at once.",
        ),
    ] = 2.0,
    log_level: Annotated[str, typer.Option(metavar="debug|info|warning|error", help="Least level to log.")] = "info",
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Append when requests came, how long they were and how they fared (never their text) to this .csv or "
            ".jsonl file: a workload that simulate, plan and bench take.",
        ),
    ] = None,
    record_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="A recording of this size is renamed to NAME.1 and a new one begun; the one before is dropped.  "
            "[default: 64MiB]",
        ),
    ] = None,
    record_steps: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Each instance appends what its steps computed and how long they took to a .csv file here.",
        ),
    ] = None,
) -> None:
    """Serve a model over the OpenAI API.

    Prefill instances read prompts; decode instances pull the KV cache from them and generate. Each is a process on
    devices of its own, so neither slows the other; a plan gives either several, with its own tensor and pipeline
    parallelism. When all are ready the address is printed, with a curl line to try.

    \b
    Examples:
      distserve serve                                        # the demo model
      distserve serve ./my-model --port 9000                 # a checkpoint in a folder
      distserve serve model.gguf --kv-memory 2GiB            # weights as llama.cpp has them
      distserve serve meta-llama/Llama-3.1-8B --plan p.toml  # the instances that the plan names
      distserve serve --record traffic.jsonl                 # for what-if on it: distserve simulate -w traffic.jsonl
    """
    try:
        memory = parse_memory(kv_memory) if kv_memory is not None else None
    except UsageError as error:
        raise UsageError(f"--kv-memory: {error}") from None
    size = parse_memory(record_size) if record_size is not None else None
    if isinstance(size, float):
        raise UsageError(f"--record-size {record_size} is a share: give a size such as 64MiB")
    options = ServeOptions(
        model=model,
        plan=plan,
        device=device,
        dtype=dtype,
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        served_model_names=tuple(served_model_name or ()),
        max_model_len=max_model_len,
        kv_memory=memory,
        block_size=block_size,
        transport=transport,
        max_batch_tokens=max_batch_tokens,
        max_queue=max_queue,
        shutdown_timeout=shutdown_timeout,
        awake=awake,
        log_level=log_level,
        record=record,
        record_size=size,
        record_steps=record_steps,
    )
    from distserve.serve.launch import serve as launch  # after the options were checked: it takes a second

    raise typer.Exit(launch(options))
