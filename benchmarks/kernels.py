"""How fast each CPU kernel is, next to what PyTorch and oneDNN do for the same work, on one core, in one run.

    python -m benchmarks.kernels [--core 1] [--rounds 7] [--json FILE|-]

How each number is taken. Shapes are the demo model's (hidden 576, 9 query and 3 key/value heads of 64, MLP 1,536,
vocabulary 49,152), in bf16; attention, which has a plain kernel beside the AMX one, in fp32 as well. A case runs over
enough layers' worth of weights or cache (30) that none stays in a cache unless the model's would. Ours and the
counterpart take turns for `--rounds` rounds after an untimed one, and the best of each counts: what disturbs a round
only ever adds time. Counterparts: for products oneDNN with a weight that is reordered already; for attention a gather
of the pages and `scaled_dot_product_attention`; for the rest plain PyTorch.

GB/s count what must be read at least once (weights, or keys and values), TFLOP/s two operations per weight and row, or
per dimension, query and key it sees, twice. The limits beside them are measured in the same run
(`benchmarks/engine_limits.py`).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks.engine_limits import Limits
from benchmarks.harness import OUT, describe, machine, report, say, table
from distserve.engine import kernels
from distserve.engine.layers import Rotary, StepLayout, add_rms_norm, rope_attention, silu_mul
from distserve.engine.layers.activation import silu_mul_reference
from distserve.engine.layers.attention import rope_attention_reference
from distserve.engine.layers.norm import rms_norm_reference

LAYERS, HIDDEN, HEADS, KV_HEADS, DIM, FFN, VOCABULARY, BLOCK = 30, 576, 9, 3, 64, 1536, 49152, 32
QKV = (HEADS + 2 * KV_HEADS) * DIM
BF16 = torch.bfloat16


@dataclass
class Case:
    """One kernel and its counterpart over the same layers. `bytes` and `operations`: of one pass over all."""

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    bytes: int = 0
    operations: int = 0


@dataclass
class Result:
    """Seconds of a pass over the layers, and what ours reads and computes a second."""

    kernel: str
    ours: float
    theirs: float
    bandwidth: float
    rate: float


def product(name: str, rows: int, inputs: int, outputs: int, layers: int = LAYERS) -> Case:
    library = kernels.load()
    assert library is not None
    x = torch.randn(rows, inputs, dtype=BF16)
    weights = [torch.randn(outputs, inputs, dtype=BF16) for _ in range(layers)]
    packed = [kernels.PackedWeight(library, weight) for weight in weights]
    reordered = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights]

    def ours() -> None:
        for weight in packed:
            weight.multiply(x)

    def theirs() -> None:
        for weight in reordered:
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    size = layers * inputs * outputs
    return Case(f"{name}, {rows} rows", ours, theirs, 2 * size, 2 * size * rows)


def attend(batch: int, context: int, prompt: bool = False, dtype: torch.dtype = BF16) -> Case:
    """A decode step of `batch` sequences, or a whole prompt of `context` tokens."""
    blocks = -(-context // BLOCK)
    pool = torch.randn(batch * blocks, LAYERS, 2, KV_HEADS, BLOCK, DIM, dtype=dtype)
    tables = [list(range(i * blocks, (i + 1) * blocks)) for i in range(batch)]
    count = context if prompt else 1
    step = StepLayout.build([count] * batch, [context] * batch, tables, BLOCK)
    qkv, rope = torch.randn(batch * count, QKV, dtype=dtype), Rotary(DIM, 1e5, context)

    def run(form: Callable[..., object]) -> Callable[[], None]:
        def layers() -> None:
            for i in range(LAYERS):
                form(qkv, rope, pool[:, i], step, HEADS, KV_HEADS, DIM**-0.5)

        return layers

    seen = batch * (context * (context + 1) // 2 if prompt else context)
    name = f"attention, prompt of {context}" if prompt else f"attention, {batch} x context {context}"
    name += ", fp32" if dtype is torch.float32 else ""
    size = 0 if prompt else LAYERS * seen * KV_HEADS * DIM * 2 * dtype.itemsize
    operations = LAYERS * seen * HEADS * DIM * 4
    return Case(name, run(rope_attention), run(rope_attention_reference), size, operations)


def norm(rows: int) -> Case:
    x, weight = torch.randn(rows, HIDDEN, dtype=BF16), torch.ones(HIDDEN, dtype=BF16)
    residual = torch.zeros(rows, HIDDEN)

    def theirs() -> None:
        rms_norm_reference(residual.add_(x), weight, 1e-5)

    return Case(f"add and norm, {rows} rows", partial(add_rms_norm, x, residual, weight, 1e-5), theirs)


def activation(rows: int) -> Case:
    both = torch.randn(rows, 2 * FFN, dtype=BF16)
    return Case(f"silu_mul, {rows} rows", partial(silu_mul, both), partial(silu_mul_reference, both))


def cases() -> Iterator[Case]:
    """One after the other: together they would not fit in memory."""
    for rows in (1, 8, 32, 128, 512, 2048):
        for name, inputs, outputs in (("qkv", HIDDEN, QKV), ("gate and up", HIDDEN, 2 * FFN), ("down", FFN, HIDDEN)):
            yield product(name, rows, inputs, outputs)
    for rows in (1, 32):
        yield product("head", rows, HIDDEN, VOCABULARY, layers=2)
    for batch, context in ((1, 256), (1, 1024), (8, 1024), (32, 1024)):
        yield attend(batch, context)
    for context in (128, 512, 2048):
        yield attend(1, context, prompt=True)
    yield attend(8, 1024, dtype=torch.float32)
    yield attend(1, 512, prompt=True, dtype=torch.float32)
    for rows in (1, 512):
        yield norm(rows)
        yield activation(rows)


def seconds(run: Callable[[], object]) -> float:
    """Of one pass; short ones are repeated until the clock can tell them."""
    passes, begin = 0, time.perf_counter()
    while True:
        run()
        passes += 1
        spent = time.perf_counter() - begin
        if spent > 0.005:
            return spent / passes


def measure(case: Case, rounds: int) -> tuple[float, float]:
    """Best seconds of (ours, theirs)."""
    case.ours(), case.theirs()
    times = [(seconds(case.ours), seconds(case.theirs)) for _ in range(rounds)]
    return min(ours for ours, _ in times), min(theirs for _, theirs in times)


def show(results: list[Result], bandwidth: float, gemm: float) -> str:
    def share(value: float, limit: float, unit: float, digits: int) -> str:
        return f"{value / unit:.{digits}f} ({value / limit:.0%})" if value else ""

    rows = [
        (
            result.kernel,
            f"{result.ours * 1e3:.3f}",
            f"{result.theirs * 1e3:.3f}",
            f"{result.theirs / result.ours:.2f}",
            share(result.bandwidth, bandwidth, 1e9, 1),
            share(result.rate, gemm, 1e12, 2),
        )
        for result in results
    ]
    return table(("kernel", "ours, ms", "theirs, ms", "ratio", "GB/s (of limit)", "TFLOP/s (of limit)"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU kernels next to PyTorch and oneDNN, on one core")
    parser.add_argument("--core", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="write the numbers there (-: stdout)")
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.core})
    kernels.set_num_threads(1)
    library = kernels.load()
    if library is None or library.unit != "tiles":
        raise SystemExit("these figures are about the AMX kernels, which do not run on this machine")

    OUT.mkdir(parents=True, exist_ok=True)
    limits = Limits()
    bandwidth, gemm = limits.bandwidth(), limits.gemm()
    results: list[Result] = []
    with torch.inference_mode():
        for case in cases():
            ours, theirs = measure(case, options.rounds)
            say(f"{case.name}: {ours * 1e3:.3f} ms, theirs {theirs * 1e3:.3f} ms")
            results.append(Result(case.name, ours, theirs, case.bytes / ours, case.operations / ours))
            bandwidth, gemm = max(bandwidth, limits.bandwidth()), max(gemm, limits.gemm())
    kind = machine()
    data = {"machine": kind, "bandwidth": bandwidth, "gemm": gemm, "kernels": [asdict(result) for result in results]}
    limit = f"limits: {bandwidth / 1e9:.1f} GB/s, {gemm / 1e12:.2f} TFLOP/s"
    report(data, f"{describe(kind)}; {limit}\n\n{show(results, bandwidth, gemm)}", options.json)


if __name__ == "__main__":
    main()
