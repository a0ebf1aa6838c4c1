"""How long a step takes by the device's datasheet: for models and devices that nobody has measured. Knows shapes and
datasheets, and no measurement but the efficiency factors below.

One pass through all layers, on each of tp ranks, n rows (tokens of prompts, or sequences that decode):

    products    reading the weights takes r seconds, computing n rows c * n; the longer counts in full, and `unhidden`
                of the shorter, because kernels neither begin to compute at once nor read to their end
    attention   prompts: 2 * heads * head_dim FLOP a layer and pair of tokens (causal); decode: reading the KV
    all-reduce  twice a layer: latency, and 2 (tp - 1) / tp of the rows' hidden states over the link (a ring)
    overhead    of a step and of each layer: norms, activations, gaps between kernels

The result is two straight lines for each phase: bound by memory, bound by arithmetic. What the host does before a step
starts (scheduling, preparing inputs) is not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distserve.costs.devices import Device
from distserve.costs.latency import Coefficients, DecodeLine, PrefillLine
from distserve.costs.memory import itemsize, kv_heads_per_rank
from distserve.specs import ModelSpec


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of a datasheet's numbers that kernels reach, and seconds that they wait.

    The defaults are today's engines: CUDA graphs, FlashAttention, all-reduce over peer memory. The first five say
    what the hardware gives, the others what the software does with it. All were fitted at once to two public sources:
    the fits of A100 measurements that LLMServe/DistServe ships (commit 82831f1 and its history, OPT-13B and OPT-66B)
    and the operator tables of aiconfigurator 0.12.0 (vLLM and TensorRT-LLM, Llama 3.1 and Qwen3, A100 and H100);
    docs/reference/devices.md says how far off the result is, also for devices that were not among them.
    """

    flops: float = 0.78
    bandwidth: float = 0.83
    unhidden: float = 0.55  # share of the shorter of reading and computing that is not hidden behind the longer
    attention_flops: float = 0.4  # of prompts
    link: float = 0.4  # of all-reduces
    kv_bandwidth: float = 0.9  # of decode's attention
    allreduce: float = 2.75e-6  # for each doubling of tp
    layer: float = 30e-6
    step: float = 500e-6
    sequence: float = 0.15e-6  # of decode: sampling


# Engines that launch each kernel from Python (the DistServe paper's, vLLM of 2023): the same hardware, other waits.
EAGER = Efficiency(kv_bandwidth=0.75, allreduce=12e-6, layer=120e-6, step=650e-6, sequence=24e-6)


def coefficients(
    spec: ModelSpec, device: Device, tp: int = 1, *, dtype: str | None = None, efficiency: Efficiency = Efficiency()
) -> Coefficients:
    """Of one pass through all layers at one tensor parallelism. `dtype` None: the checkpoint's own. Raises `PlanError`
    where tp does not divide the model."""
    size = itemsize(spec, dtype)
    kv_token = spec.num_layers * 2 * kv_heads_per_rank(spec, tp) * spec.head_dim * size
    body, head = spec.num_layers * spec.layer_matrices / tp, spec.vocab_size * spec.hidden_size / tp
    peak = device.flops * (1.0 if size == 2 else 0.5)  # 32 bits: TF32, half as fast

    read = (body + head) * size / (device.bandwidth * efficiency.bandwidth)
    token = 2 * body / (peak * efficiency.flops)  # only a prompt's last token goes through the head
    sequence = 2 * (body + head) / (peak * efficiency.flops)
    square = 2 * spec.num_layers * spec.num_heads * spec.head_dim / tp / (peak * efficiency.attention_flops)
    context = kv_token / (device.bandwidth * efficiency.kv_bandwidth)
    reduce = _allreduce(spec, device, tp, size, efficiency)
    waits = efficiency.step + spec.num_layers * (efficiency.layer + 2 * efficiency.allreduce * math.log2(tp))

    shorter = efficiency.unhidden
    prefill = (
        PrefillLine(waits + read, shorter * token + reduce, square),
        PrefillLine(waits + shorter * read, token + reduce, square),
    )
    knee = max(1, math.ceil(read / sequence))  # sequences from which computing takes longer than reading
    fixed = reduce + efficiency.sequence
    decode = (
        DecodeLine(1, waits + read, context, shorter * sequence + fixed),
        DecodeLine(knee, waits + shorter * read, context, sequence + fixed),
    )
    return Coefficients(prefill, decode if knee > 1 else decode[1:])


def _allreduce(spec: ModelSpec, device: Device, tp: int, size: int, efficiency: Efficiency) -> float:
    """Seconds for each row. Over bridges the ranks' transfers go one after the other."""
    sent = 2 * spec.num_layers * spec.hidden_size * size * 2 * (tp - 1) / tp
    link = device.link_bandwidth / (tp - 1 if device.bridged and tp > 1 else 1)
    return sent / (link * efficiency.link)
