"""`distserve profile`: checks what was asked, measures, writes a costs file, tells what came of it.

Ctrl-C ends the measuring, not the command: what is there is written, if a fit can be made of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version

from rich.console import Console

from distserve import machine
from distserve.costs import format
from distserve.engine.base import EngineOptions
from distserve.errors import DistserveError, PlanError, UsageError
from distserve.outputs import check_writable, write_text
from distserve.plan import parse_memory
from distserve.profiler import assemble, phases, show
from distserve.profiler.grid import Range
from distserve.profiler.phases import Budget, Findings
from distserve.profiler.worker import find
from distserve.profiler.workers import Workers
from distserve.specs import DTYPE_BYTES, ModelSpec

GPU_SHARE = 0.4  # of a GPU's memory, of each of two workers that share it
LEAST = 10.0  # seconds
LARGEST_BATCH = 256  # sequences that an instance decodes together, as schedulers have it
ENOUGH_PROMPT = 2048  # tokens; past the knee of most devices, and what lies beyond is a parabola


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    model: str
    out: str
    tp: int = 1
    pp: int = 1
    device: str = "auto"
    dtype: str = "auto"
    kv_memory: str | None = None
    block_size: int = 32
    longest: int | None = None
    time: float = 160.0
    live: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.time) and self.time >= LEAST):
            raise UsageError(f"--time {self.time:g} is too short to measure anything: give {LEAST:g} seconds at least")
        if self.longest is not None and self.longest < 64:
            raise UsageError(f"--longest {self.longest} is too short for a fit: give 64 tokens at least")
        for option, given, known in (
            ("--device", self.device, ("auto", "cpu", "cuda")),
            ("--dtype", self.dtype, ("auto", *DTYPE_BYTES)),
            ("--block-size", self.block_size, (16, 32, 64)),
        ):
            if given not in known:
                raise UsageError(f"{option} {given} is unknown: one of {', '.join(map(str, known))}")
        for name, value in (("--tp", self.tp), ("--pp", self.pp)):
            if value < 1:
                raise UsageError(f"{name} {value} is too small: at least 1")
        if self.tp * self.pp > 1:
            raise PlanError(
                f"--tp {self.tp} --pp {self.pp}: only instances of one device can be measured yet; leave both at 1"
            )


def run(options: Options) -> int:
    """The whole command; returns the exit status."""
    check_writable("--output", options.out)
    path, spec = find(options.model)
    engines = _engines(options, path, spec)
    found = Findings()
    interrupted = _measure(options, engines, spec, found)
    if lacks := assemble.missing(found):
        show.say(f"stopped before a fit could be made: {lacks} are needed; nothing was written")
        return 130 if interrupted else 1
    table = assemble.table(found, _heading(options, engines[0], spec))
    format.read(table, options.out)  # what is written can be read
    write_text(options.out, format.text(table))
    console = Console(stderr=options.out == "-", soft_wrap=True)
    show.summary(found, table, found.knee(spec.max_model_len), console)
    for warning in show.warnings(found, table):
        show.say(f"warning: {warning}")
    if options.out != "-":
        show.say(f"wrote {options.out}{' with what was measured so far' if interrupted else ''}")
    return 130 if interrupted else 0


def _engines(options: Options, path: str, spec: ModelSpec) -> list[EngineOptions]:
    """Of two workers: neighbours as `distserve serve` would place two instances, a core or a GPU each."""
    device = machine.resolve_device(options.device)
    numbers = machine.cores() if device == "cpu" else list(range(machine.gpus()))
    places = (numbers * 2)[:2]
    memory = None if options.kv_memory is None else parse_memory(options.kv_memory)
    engine = EngineOptions(model=path, dtype=options.dtype, block_size=options.block_size)
    if device == "cpu":
        size = int(memory * machine.memory()) if isinstance(memory, float) else memory or machine.DEFAULT_KV
        return [replace(engine, kv_bytes=size, cores=(core,)) for core in places]
    total = machine.gpu_memory(0)
    if isinstance(memory, float):
        memory = int(memory * total)
    weights = spec.weight_bytes(spec.dtype if options.dtype == "auto" else options.dtype)
    left = int((GPU_SHARE if places[0] == places[1] else 2 * GPU_SHARE) * total) - weights
    if left <= 0:
        raise PlanError(
            f"the model's weights, {weights / 2**30:.1f} GiB, leave a GPU of {total / 2**30:.1f} GiB no room"
        )
    return [replace(engine, kv_bytes=memory or left, device=f"cuda:{index}") for index in places]


def _measure(options: Options, engines: list[EngineOptions], spec: ModelSpec, found: Findings) -> bool:
    """Fills `found`; True: Ctrl-C ended it."""
    title = f"measuring {options.model} ({machine.device_name(machine.resolve_device(options.device))})"
    with show.progress(title, options.time) as tell:

        async def work() -> None:
            tell("loading", options.time)
            await _phases(options, engines, spec, found, Budget(options.time, tell))

        try:
            asyncio.run(_interruptible(work))
        except (asyncio.CancelledError, KeyboardInterrupt):  # the latter: before anything had begun
            return True
    return False


async def _interruptible(work: Callable[[], Coroutine[None, None, None]]) -> None:
    """Ctrl-C cancels the work, which then ends its processes."""
    task = asyncio.ensure_future(work())
    loop = asyncio.get_running_loop()
    with _handler(loop, task):
        await task


@contextlib.contextmanager
def _handler(loop: asyncio.AbstractEventLoop, task: asyncio.Future[None]) -> Iterator[None]:
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _phases(
    options: Options, engines: list[EngineOptions], spec: ModelSpec, found: Findings, budget: Budget
) -> None:
    async with Workers(engines) as workers:
        first = workers.all[0]
        longest = min(options.longest or ENOUGH_PROMPT, first.ready.max_model_len - 2 * phases.STEPS)
        within = Range(
            longest_prompt=longest,
            longest_context=longest,
            kv_tokens=first.ready.num_blocks * first.ready.block_size,
            largest_batch=LARGEST_BATCH,
            block_size=first.ready.block_size,
        )
        budget.begin("prefill")
        await phases.prefill(first, within, found, budget)
        budget.begin("decode")
        await phases.decode(first, within, found, budget)
        budget.begin("mixed")
        await phases.mixed(first, within, found, budget)
        budget.begin("neighbours")
        await phases.neighbours(workers.all, within, found, budget)
        budget.begin("pulls")
        await phases.pulls(workers.all, within, found, budget)
    budget.begin("live")
    if options.live:
        try:
            await phases.live(_serve_arguments(options, engines[0], found, longest), within, found, budget)
        except DistserveError as error:
            show.say(f"warning: what a request costs around the engine is not known: {error}")


def _serve_arguments(options: Options, engine: EngineOptions, found: Findings, longest: int) -> list[str]:
    return [
        options.model,
        *("--device", "cpu" if engine.device == "cpu" else "cuda"),
        *("--dtype", options.dtype),
        *("--block-size", str(options.block_size)),
        *("--kv-memory", str(engine.kv_bytes)),
        *("--max-batch-tokens", str(found.knee(longest))),
        *("--log-level", "warning"),
    ]


def _heading(options: Options, engine: EngineOptions, spec: ModelSpec) -> assemble.Heading:
    device = machine.resolve_device(options.device)
    dtype = spec.dtype if options.dtype == "auto" else options.dtype
    layout = spec.kv_layout(options.block_size, dtype)
    on_cpu = device == "cpu"
    return assemble.Heading(
        device=machine.device_name(device),
        dtype=dtype,
        date=datetime.now(UTC).date().isoformat(),
        source="distserve profile",
        model=options.model,
        degree=str(options.tp) if options.pp == 1 else f"{options.tp}x{options.pp}",
        fingerprint=machine.fingerprint(device),
        versions=f"distserve {version('distserve')}, torch {version('torch')}",
        memory=machine.memory() // len(machine.cores()) if on_cpu else machine.gpu_memory(0),
        block_size=options.block_size,
        token_bytes=layout.token_bytes,
        kv_memory=engine.kv_bytes if on_cpu or options.kv_memory is not None else None,
    )
