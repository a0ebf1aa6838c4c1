"""Where the profiler's workers run: two instances as `distserve serve` would place them, a core or a GPU for each rank.
Knows no process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distserve import machine
from distserve.engine.base import EngineOptions
from distserve.errors import PlanError
from distserve.placement import place
from distserve.plan import InstanceSpec, Plan, Role, parse_memory
from distserve.specs import ModelSpec

GPU_SHARE = 0.4  # of a GPU's memory, of each of two workers that share it


@dataclass(frozen=True, slots=True)
class Places:
    """Of two workers."""

    engines: list[EngineOptions]
    neighbours: bool  # what one is slowed by the other can be measured
    crowd: str  # a sentence where ranks of one instance take turns on a core; else empty


def both(tp: int, pp: int) -> Plan:
    """One prefill and one decode instance of so many ranks each."""
    return Plan((InstanceSpec(Role.PREFILL, tp=tp, pp=pp), InstanceSpec(Role.DECODE, tp=tp, pp=pp)))


def places(engine: EngineOptions, device: str, kv_memory: str | None, spec: ModelSpec) -> Places:
    """`engine` says what is computed, and by how many ranks; `device`: "cpu" or "cuda". Raises `PlanError` where it
    does not fit this machine."""
    on_cpu = device == "cpu"
    numbers = machine.cores() if on_cpu else list(range(machine.gpus()))
    found = place(both(engine.tp, engine.pp), numbers, share=True, crowd=on_cpu)
    mine, other = found.ranks.values()
    apart = not set(mine) & set(other)
    count = engine.num_ranks
    memory = None if kv_memory is None else parse_memory(kv_memory)
    size = _on_cpu(memory, count) if on_cpu else _on_gpu(memory, engine, spec, apart)
    crowd = ""
    if count > len(numbers):
        crowd = f"{count} ranks of an instance take turns on {len(numbers)} cores"
    engines = [_engine(replace(engine, kv_bytes=size), ranks, on_cpu) for ranks in (mine, other)]
    return Places(engines, apart or count == 1, crowd)  # of one rank each, they share a machine's only device


def _engine(engine: EngineOptions, ranks: Sequence[tuple[int, ...]], on_cpu: bool) -> EngineOptions:
    alone = len(ranks) == 1
    return replace(
        engine,
        device="cpu" if on_cpu else f"cuda:{ranks[0][0]}" if alone else "cuda",
        cores=tuple(sorted({core for cores in ranks for core in cores})) if on_cpu else (),
        ranks=() if alone else tuple(ranks),
    )


def _on_cpu(memory: int | float | None, ranks: int) -> int:
    """Bytes of KV of each rank. As `distserve serve` has it: a share of the main memory, and the default, are the
    instance's."""
    if isinstance(memory, int):
        return memory
    return int(memory * machine.memory() if memory is not None else machine.DEFAULT_KV) // ranks


def _on_gpu(memory: int | float | None, engine: EngineOptions, spec: ModelSpec, apart: bool) -> int:
    total = machine.gpu_memory(0)
    if isinstance(memory, float):
        memory = int(memory * total)
    dtype = spec.dtype if engine.dtype == "auto" else engine.dtype
    weights = spec.weight_bytes(dtype) // engine.num_ranks
    left = int((2 * GPU_SHARE if apart else GPU_SHARE) * total) - weights
    if left <= 0:
        raise PlanError(
            f"the model's weights, {weights / 2**30:.1f} GiB of each rank, leave a GPU of {total / 2**30:.1f} GiB no "
            "room"
        )
    return memory or left
