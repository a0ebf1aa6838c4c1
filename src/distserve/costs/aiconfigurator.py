"""Step times from measured operator tables: NVIDIA's aiconfigurator (Apache-2.0, extra `gpu-tables`) ships how long
matrix products, attention and all-reduces take on several GPUs, and adds them up for a model. Knows no way to measure.

Its predictions are sampled once for each (model, device, tp) and put into `Coefficients`:

    prefill    lines along the lower edge of the samples of single prompts; what is above an edge is kept as points.
               The square term is what one long prompt takes longer than many short ones of as many tokens
    decode     by batch size a line through the samples' contexts; linear between two sampled batch sizes

What the tables do not hold: the host's work before a step, families without a gated MLP (OPT, GPT-2), 32-bit weights.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from distserve.costs.latency import Coefficients, DecodeLine, PrefillLine
from distserve.costs.memory import itemsize, kv_heads_per_rank
from distserve.errors import PlanError
from distserve.specs import ModelSpec

SYSTEMS = {  # name in our catalogue of devices -> theirs
    "a100-80g": "a100_sxm",
    "h100-80g": "h100_sxm",
    "h200": "h200_sxm",
    "b200": "b200_sxm",
    "l40s": "l40s",
}
BACKENDS = ("vllm", "trtllm", "sglang")  # whose kernels were measured
MAX_TP = 8  # the tables' all-reduces are those of one node

PROMPTS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # tokens
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXTS = (128, 512, 2048, 8192)  # tokens of each sequence


Measure = Callable[[int, int], float]  # (sequences, tokens of each) -> seconds


class NoTables(PlanError):
    """The tables do not hold this model on this device, or are not installed: the message says which."""


def coefficients(
    spec: ModelSpec, device: str, tp: int = 1, *, dtype: str | None = None, backend: str = "vllm"
) -> tuple[Coefficients, str]:
    """(of one pass through all layers, where they come from). Takes a second or two. Raises `NoTables`,
    and `PlanError` where tp does not divide the model."""
    kv_heads_per_rank(spec, tp)  # refuses a tp that does not divide the model
    if backend not in BACKENDS:
        raise PlanError(f"backend {backend!r} has no tables: one of {', '.join(BACKENDS)}")
    if reason := _reason_against(spec, device, tp, dtype):
        raise NoTables(reason)
    try:
        with _quiet(), tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(_config(spec)))
            engine = _engine(folder, SYSTEMS[device], backend, tp)
            found = sampled(
                lambda batch, tokens: engine.predict_prefill_latency(batch, tokens) / 1000,
                lambda batch, tokens: engine.predict_decode_latency(batch, tokens - 1) / 1000,
            )
    except (ValueError, RuntimeError, AssertionError) as error:  # what its errors derive from
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise NoTables(f"aiconfigurator has no tables for this model on {device}: {reason}") from error
    version = metadata.version("aiconfigurator-core")
    return found, f"aiconfigurator {version}, measured operators of {backend} on {SYSTEMS[device]}"


def sampled(prefill: Measure, decode: Measure) -> Coefficients:
    """Coefficients that say what was sampled, with straight lines in between."""
    square = _square(prefill)
    products = [(float(n), prefill(1, n) - square * n * n) for n in PROMPTS]
    lines = tuple(PrefillLine(base, slope, square) for base, slope in _lower_edge(products))
    rest = tuple((n, y - max(line(n, 0.0) for line in lines)) for n, y in products)
    rows = [(batch, *_line([(batch * each, decode(batch, each)) for each in CONTEXTS])) for batch in BATCHES]
    return Coefficients(lines, tuple(_decode_lines(rows)), prefill_rest=((1.0, rest),))


def _reason_against(spec: ModelSpec, device: str, tp: int, dtype: str | None) -> str | None:
    if device not in SYSTEMS:
        return f"aiconfigurator has no tables of {device}; it has {', '.join(SYSTEMS)}"
    if not spec.gated_mlp:
        return f"aiconfigurator models no {spec.family} (an MLP without gate)"
    if itemsize(spec, dtype) != 2:
        return "aiconfigurator's tables are of 16-bit weights"
    if tp > MAX_TP:
        return f"aiconfigurator's tables end at tp = {MAX_TP}, one node"
    try:
        metadata.version("aiconfigurator-core")
    except metadata.PackageNotFoundError:
        return "aiconfigurator is not installed (pip install 'distserve[gpu-tables]')"
    return None


def _square(prefill: Measure) -> float:
    """Seconds per token^2."""
    long, parts = PROMPTS[-2], 16
    short = long // parts
    return max(0.0, (prefill(1, long) - prefill(parts, short)) / (long**2 - parts * short**2))


def _lower_edge(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(value at 0, slope) of the lines that bound the points from below."""
    edge: list[tuple[float, float]] = []
    for x, y in points:
        while len(edge) > 1 and (y - edge[-1][1]) * (edge[-1][0] - edge[-2][0]) <= (edge[-1][1] - edge[-2][1]) * (
            x - edge[-1][0]
        ):
            edge.pop()
        edge.append((x, y))
    slopes = [((y1 - y0) / (x1 - x0), x0, y0) for (x0, y0), (x1, y1) in pairwise(edge)]
    return [(y - max(0.0, slope) * x, max(0.0, slope)) for slope, x, y in slopes]


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(value at 0, slope) of the line closest to the points, relative to their values."""
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True)) / spread
    return mean_y - slope * mean_x, slope


def _decode_lines(rows: Sequence[tuple[int, float, float]]) -> Iterator[DecodeLine]:
    """Lines between neighbouring (batch, value at no context, per context). The last goes on as it was."""
    for (batch, here, context), (more, there, further) in pairwise(rows):
        per_sequence = (there - here) / (more - batch)
        yield DecodeLine(batch, here - per_sequence * batch, (context + further) / 2, per_sequence)


def _config(spec: ModelSpec) -> dict[str, Any]:
    """The shape as a Hugging Face configuration of a model that they know."""
    return {
        "architectures": ["Qwen3ForCausalLM" if spec.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if spec.qk_norm else "llama",
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.ffn_size,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_model_len,
        "torch_dtype": "bfloat16",
    }


def _engine(folder: str, system: str, backend: str, tp: int) -> Any:
    from aiconfigurator_core.sdk.engine import EngineHandle

    return EngineHandle.compile(folder, system, backend, tp_size=tp)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without its remarks on tables that dense models do not use."""
    logger = logging.getLogger("aiconfigurator_core")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
