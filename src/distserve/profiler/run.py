"""`distserve profile`: checks what was asked, measures, writes a costs file, tells what came of it.

Ctrl-C ends the measuring, not the command: what is there is written, if a fit can be made of it.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from distserve import machine
from distserve.costs import format
from distserve.engine.base import EngineOptions
from distserve.errors import DistserveError, UsageError
from distserve.interrupts import interruptible
from distserve.outputs import check_writable, write_text
from distserve.profiler import add, assemble, phases, show
from distserve.profiler.grid import Range
from distserve.profiler.phases import Budget, Findings
from distserve.profiler.place import Places, both, places
from distserve.profiler.worker import find
from distserve.profiler.workers import Workers
from distserve.specs import DTYPE_BYTES, ModelSpec

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
    add: bool = False  # to the file, if it is there

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
        if self.add and self.out == "-":
            raise UsageError("--add adds to a file: give --output FILE with it")


def run(options: Options) -> int:
    """The whole command; returns the exit status."""
    check_writable("--output", options.out)
    path, spec = find(options.model, options.tp, options.pp)
    engine = EngineOptions(path, dtype=options.dtype, block_size=options.block_size, tp=options.tp, pp=options.pp)
    where = places(engine, machine.resolve_device(options.device), options.kv_memory, spec)
    heading = _heading(options, where.engines[0], spec)
    old = add.known(options.out, heading) if options.add else None
    if where.crowd:
        show.say(f"warning: {where.crowd}: where each has its own they are faster than these costs will say")
    found = Findings()
    interrupted = _measure(options, where, steps_only=old is not None, found=found)
    if lacks := assemble.missing(found):
        show.say(f"stopped before a fit could be made: {lacks} are needed; nothing was written")
        return 130 if interrupted else 1
    table = assemble.table(found, heading)
    table["note"] = "; ".join([table["note"], *_lacks(where, steps_only=old is not None)])
    whole = table if old is None else add.merged(old, table, heading)
    format.read(whole, options.out)  # what is written can be read
    write_text(options.out, format.text(whole))
    console = Console(stderr=options.out == "-", soft_wrap=True)
    show.summary(found, table, found.knee(spec.max_model_len), console)
    more = [add.other_memory(old, heading)] if old is not None else []
    for warning in filter(None, [*show.warnings(found, table), *more]):
        show.say(f"warning: {warning}")
    if options.out != "-":
        verb = "wrote" if old is None else f"added {show.degree(options.tp, options.pp)} to"
        show.say(f"{verb} {options.out}{' with what was measured so far' if interrupted else ''}")
    return 130 if interrupted else 0


def _lacks(where: Places, *, steps_only: bool) -> list[str]:
    """What a reader of the file should know of how this machine measured it."""
    said = [where.crowd] if where.crowd else []
    if not where.neighbours and not steps_only:
        said.append("nothing was measured beside a neighbour: two such instances have no devices of their own here")
    return said


def _measure(options: Options, where: Places, *, steps_only: bool, found: Findings) -> bool:
    """Fills `found`; True: Ctrl-C ended it. `steps_only`: the rest is known."""
    title = f"measuring {options.model} ({machine.device_name(machine.resolve_device(options.device))})"
    with show.progress(title, options.time) as tell:

        async def work() -> None:
            tell("loading", options.time)
            budget = Budget(options.time, tell)
            within = await _engine(options, where, steps_only, found, budget)
            if options.live and not steps_only:
                await _live(options, where.engines[0], within, found, budget)

        try:
            return asyncio.run(interruptible(work))
        except KeyboardInterrupt:  # before anything had begun, or the second
            return True


async def _engine(options: Options, where: Places, steps_only: bool, found: Findings, budget: Budget) -> Range:
    """What two instances tell; of steps alone, one. Returns what was measured up to."""
    async with Workers(where.engines[:1] if steps_only else where.engines) as workers:
        first = workers.all[0]
        longest = min(options.longest or ENOUGH_PROMPT, first.ready.max_model_len - 2 * phases.STEPS)
        within = Range(
            longest_prompt=longest,
            longest_context=longest,
            kv_tokens=first.ready.num_blocks * first.ready.block_size,
            largest_batch=LARGEST_BATCH,
            block_size=first.ready.block_size,
        )
        budget.begin("steps")
        await phases.steps(first, within, found, budget)
        if steps_only:
            return within
        if where.neighbours:
            budget.begin("neighbours")
            await phases.neighbours(workers.all, within, found, budget)
        budget.begin("pulls")
        await phases.pulls(workers.all, within, found, budget)
    return within


async def _live(options: Options, engine: EngineOptions, within: Range, found: Findings, budget: Budget) -> None:
    """A server around two such instances."""
    budget.begin("live")
    with tempfile.TemporaryDirectory(prefix="distserve-") as folder:
        plan = Path(folder) / "plan.toml"
        plan.write_text(both(options.tp, options.pp).to_toml(), encoding="utf-8")
        try:
            arguments = _serve_arguments(options, engine, str(plan), found.knee(within.longest_prompt))
            await phases.live(arguments, within, found, budget)
        except DistserveError as error:
            show.say(f"warning: what a request costs around the engine is not known: {error}")


def _serve_arguments(options: Options, engine: EngineOptions, plan: str, knee: int) -> list[str]:
    return [
        options.model,
        *("--plan", plan),
        *("--device", "cpu" if engine.device == "cpu" else "cuda"),
        *("--dtype", options.dtype),
        *("--block-size", str(options.block_size)),
        *("--kv-memory", str(engine.kv_bytes)),
        *("--max-batch-tokens", str(knee)),
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
        degree=show.degree(options.tp, options.pp),
        fingerprint=machine.fingerprint(device),
        versions=f"distserve {version('distserve')}, torch {version('torch')}",
        memory=machine.memory() // len(machine.cores()) if on_cpu else machine.gpu_memory(0),
        block_size=options.block_size,
        token_bytes=layout.token_bytes,
        kv_memory=engine.kv_bytes if on_cpu or options.kv_memory is not None else None,
    )
