"""From a plan to the instances of this machine: which cores or GPUs, how much KV memory, which policy.

Everything that does not fit is refused here, before a process starts, with the cure.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from distserve import machine
from distserve.engine.base import EngineOptions
from distserve.errors import PlanError, UsageError
from distserve.placement import place
from distserve.plan import Plan, Policy, Replica
from distserve.serve.config import InstanceConfig
from distserve.serve.fleet import Start
from distserve.serve.options import ServeOptions
from distserve.specs import KVLayout, ModelSpec

log = logging.getLogger(__name__)

DEFAULT_KV = 1 << 30  # bytes of an instance's KV memory on a CPU
GPU_SHARE = 0.85  # of a GPU's memory, for weights and KV together
GPU_RESERVE = 2 << 30  # bytes of a GPU for activations and the driver


def starts(options: ServeOptions, plan: Plan, model: str, spec: ModelSpec) -> list[Start]:
    """One `Start` a replica. `model` is the checkpoint's local path. Raises `PlanError` and `UsageError`."""
    device = machine.resolve_device(options.device if options.device != "auto" else plan.device or "auto")
    for replica in plan.replicas():
        if replica.spec.num_ranks > 1:
            raise PlanError(
                f"{replica.name} asks for tp = {replica.spec.tp}, pp = {replica.spec.pp}: an instance runs on one "
                "device for now; set both to 1 and raise count"
            )
    if options.max_model_len is not None and options.max_model_len > spec.max_model_len:
        raise UsageError(
            f"--max-model-len {options.max_model_len} is more than the checkpoint was made for: give at most "
            f"{spec.max_model_len}"
        )
    on_cpu = device == "cpu"
    numbers = machine.cores() if on_cpu else list(range(machine.gpus()))
    placement = place(plan, numbers, share=True, spread=on_cpu)
    for warning in placement.warnings:
        log.warning("%s", warning)
    where = {name: ranks[0] for name, ranks in placement.ranks.items()}
    dtype = spec.dtype if options.dtype == "auto" else options.dtype
    sizes = {r.name: _kv_bytes(options, r, where, spec.weight_bytes(dtype), on_cpu) for r in plan.replicas()}
    _check_blocks(sizes, spec.kv_layout(options.block_size, dtype))
    if on_cpu:
        _check_memory(sizes, spec.weight_bytes(dtype))
    found = []
    for replica in plan.replicas():
        engine = EngineOptions(
            model=model,
            device="cpu" if on_cpu else f"cuda:{where[replica.name][0]}",
            dtype=options.dtype,
            block_size=options.block_size,
            kv_bytes=sizes[replica.name],
            max_model_len=options.max_model_len,
            cores=where[replica.name] if on_cpu else (),
        )
        num_threads = len(engine.cores) or 1
        configure = _configure(options, replica, engine)
        found.append(Start(replica.name, replica.role, configure, forkable=on_cpu, num_threads=num_threads))
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
            log_level=options.log_level,
        )

    return configure


def _kv_bytes(
    options: ServeOptions, replica: Replica, where: dict[str, tuple[int, ...]], weights: int, on_cpu: bool
) -> int:
    """Bytes of KV memory of one instance."""
    asked = replica.spec.kv_memory or options.kv_memory
    total = machine.memory() if on_cpu else machine.gpu_memory(where[replica.name][0])
    if isinstance(asked, int):
        return asked
    if asked is not None:
        return int(asked * total)
    if on_cpu:
        return DEFAULT_KV
    sharing = sum(devices == where[replica.name] for devices in where.values())
    left = int(GPU_SHARE * total / sharing) - weights - GPU_RESERVE
    if left <= 0:
        raise PlanError(
            f"{replica.name} needs {weights / 2**30:.1f} GiB for weights but its share of GPU "
            f"{where[replica.name][0]} is {GPU_SHARE * total / sharing / 2**30:.1f} GiB: use one GPU an instance, "
            "or a smaller model"
        )
    return left


def _check_blocks(sizes: dict[str, int], layout: KVLayout) -> None:
    for name, size in sizes.items():
        if size < layout.block_bytes:
            raise PlanError(
                f"{size} bytes of KV memory hold no block of {layout.block_size} tokens: {name} needs at least "
                f"{layout.block_bytes} bytes (--kv-memory, or kv_memory in the plan)"
            )


def _check_memory(sizes: dict[str, int], weights: int) -> None:
    need, have = sum(sizes.values()) + weights * len(sizes), machine.memory()
    if need > have:
        raise UsageError(
            f"{len(sizes)} instances need {need / 2**30:.1f} GiB ({weights / 2**30:.1f} GiB of weights each, and KV "
            f"memory) but this machine has {have / 2**30:.1f} GiB: lower --kv-memory or the number of instances"
        )
