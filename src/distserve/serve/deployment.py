"""From a plan to the instances of this machine: which cores or GPUs each rank has, how much KV memory, which policy.

Everything that does not fit is refused here, before a process starts, with the cure.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from distserve import machine
from distserve.engine.base import EngineOptions
from distserve.errors import PlanError, UsageError
from distserve.placement import place
from distserve.plan import Plan, Policy, Replica
from distserve.serve.config import InstanceConfig
from distserve.serve.fleet import Start
from distserve.serve.options import ServeOptions
from distserve.specs import DTYPE_BYTES, KVLayout, ModelSpec

log = logging.getLogger(__name__)

GPU_SHARE = 0.85  # of a GPU's memory, for weights and KV together
GPU_RESERVE = 2 << 30  # bytes of a GPU for activations and the driver

Where = Mapping[str, tuple[tuple[int, ...], ...]]  # by replica: the cores, or the GPU, of each rank


def starts(options: ServeOptions, plan: Plan, model: str, spec: ModelSpec) -> list[Start]:
    """One `Start` a replica. `model` is the checkpoint's local path. Raises `PlanError` and `UsageError`."""
    device = machine.resolve_device(options.device if options.device != "auto" else plan.device or "auto")
    if options.max_model_len is not None and options.max_model_len > spec.max_model_len:
        raise UsageError(
            f"--max-model-len {options.max_model_len} is more than the checkpoint was made for: give at most "
            f"{spec.max_model_len}"
        )
    on_cpu = device == "cpu"
    if plan.machine is not None and plan.machine != (here := machine.fingerprint(device)):
        log.warning(
            "the plan was chosen by what steps cost on another machine (%s) than this one (%s): measure here "
            "(distserve profile) and plan again",
            plan.machine,
            here,
        )
    numbers = machine.cores() if on_cpu else list(range(machine.gpus()))
    placement = place(plan, numbers, share=True, crowd=on_cpu, spread=on_cpu)
    for warning in placement.warnings:
        log.warning("%s", warning)
    dtype = spec.dtype if options.dtype == "auto" else options.dtype
    where, weights = placement.ranks, {r.name: _rank_weights(spec, dtype, r) for r in plan.replicas()}
    sizes = {r.name: _kv_bytes(options, r, where, weights, on_cpu) for r in plan.replicas()}
    for replica in plan.replicas():
        _check_blocks(replica, sizes[replica.name], spec.kv_layout(options.block_size, dtype))
    if on_cpu:
        ranks = {replica.name: replica.spec.num_ranks for replica in plan.replicas()}
        _check_memory({name: size * ranks[name] for name, size in sizes.items()}, spec.weight_bytes(dtype))
    found = []
    for replica in plan.replicas():
        of_ranks = where[replica.name]
        alone = len(of_ranks) == 1
        engine = EngineOptions(
            model=model,
            device="cpu" if on_cpu else f"cuda:{of_ranks[0][0]}" if alone else "cuda",
            dtype=options.dtype,
            block_size=options.block_size,
            kv_bytes=sizes[replica.name],
            max_model_len=options.max_model_len,
            cores=tuple(sorted({core for cores in of_ranks for core in cores})) if on_cpu else (),
            tp=replica.spec.tp,
            pp=replica.spec.pp,
            ranks=() if alone else of_ranks,
        )
        num_threads = max(map(len, of_ranks)) if on_cpu else 1
        configure = _configure(options, replica, engine)
        found.append(
            Start(
                replica.name,
                replica.role,
                configure,
                forkable=on_cpu,
                num_threads=num_threads,
                num_ranks=len(of_ranks),
            )
        )
    return found


def _configure(
    options: ServeOptions, replica: Replica, engine: EngineOptions
) -> Callable[[int, str, str], InstanceConfig]:
    spec = replica.spec
    tokens = spec.max_batch_tokens or spec.chunk_tokens or options.max_batch_tokens

    def configure(epoch: int, gateway: str, notices: str) -> InstanceConfig:
        return InstanceConfig(
            name=replica.name,
            role=replica.role,
            epoch=epoch,
            gateway=gateway,
            notices=notices,
            engine=engine,
            policy=spec.policy or Policy.CHUNKED,
            max_batch_tokens=tokens,
            transport="shm" if options.transport == "auto" else options.transport,  # all are on this host
            log_level=options.log_level,
            awake=options.awake if engine.device == "cpu" else 0.0,
            steps=str(options.record_steps.absolute()) if options.record_steps is not None else None,
        )

    return configure


def _kv_bytes(options: ServeOptions, replica: Replica, where: Where, weights: Mapping[str, int], on_cpu: bool) -> int:
    """Bytes of KV memory of each rank. A machine's main memory is that of all of an instance's ranks together, so a
    share of it, and the default, are the instance's."""
    asked = replica.spec.kv_memory or options.kv_memory
    if isinstance(asked, int):
        return asked
    if on_cpu:
        return int(asked * machine.memory() if asked is not None else machine.DEFAULT_KV) // replica.spec.num_ranks
    return min(_gpu_kv_bytes(replica, asked, rank[0], where, weights) for rank in where[replica.name])


def _gpu_kv_bytes(replica: Replica, asked: float | None, gpu: int, where: Where, weights: Mapping[str, int]) -> int:
    total = machine.gpu_memory(gpu)
    if asked is not None:
        return int(asked * total)
    sharing = sum(rank == (gpu,) for ranks in where.values() for rank in ranks)
    mine = weights[replica.name]
    left = int(GPU_SHARE * total / sharing) - mine - GPU_RESERVE
    if left <= 0:
        raise PlanError(
            f"{replica.name} needs {mine / 2**30:.1f} GiB for weights but its share of GPU {gpu} is "
            f"{GPU_SHARE * total / sharing / 2**30:.1f} GiB: use one GPU an instance, a higher tp or pp, or a smaller "
            "model"
        )
    return left


def _rank_weights(spec: ModelSpec, dtype: str, replica: Replica) -> int:
    """Bytes of weights on the rank that holds most: its share of the longest stage's layers and of the tables."""
    tp, pp = replica.spec.tp, replica.spec.pp
    total = spec.weight_bytes(dtype)
    table = spec.vocab_size * (spec.embedding_size or spec.hidden_size) * DTYPE_BYTES[dtype]
    tables = table if spec.tied_embeddings else 2 * table
    layers = (total - tables) * -(-spec.num_layers // pp) // spec.num_layers
    return (layers + (tables if pp == 1 else table)) // tp


def _check_blocks(replica: Replica, size: int, layout: KVLayout) -> None:
    """The layers and heads of the rank that holds most."""
    tp, pp = replica.spec.tp, replica.spec.pp
    need = layout.block_bytes * -(-layout.num_layers // pp) // layout.num_layers
    need = need * max(1, layout.num_kv_heads // tp) // layout.num_kv_heads
    if size < need:
        raise PlanError(
            f"{size} bytes of KV memory hold no block of {layout.block_size} tokens: {replica.name} needs at least "
            f"{need} bytes{' on each rank' if tp * pp > 1 else ''} (--kv-memory, or kv_memory in the plan)"
        )


def _check_memory(sizes: Mapping[str, int], weights: int) -> None:
    need, have = sum(sizes.values()) + weights * len(sizes), machine.memory()
    if need > have:
        raise UsageError(
            f"{len(sizes)} instances need {need / 2**30:.1f} GiB ({weights / 2**30:.1f} GiB of weights each, and KV "
            f"memory) but this machine has {have / 2**30:.1f} GiB: lower --kv-memory or the number of instances"
        )
