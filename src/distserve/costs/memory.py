"""What fits on a device: weights and KV of one rank of an instance, for any model, tp and pp. Knows no speed.

    budget      utilization * memory - activation * memory
    weights     of the stage's layers: matrices / tp, norms and biases whole; tables of the first and the last stage
    KV blocks   floor((budget - weights) / bytes of a block on this rank); the stage with fewest limits the instance

How carefully that is counted is an `Accounting`: `Accounting()` is ours, `DISTSERVE` the one of the DistServe paper's
simulator (LLMServe/DistServe, simdistserve/profilers/profile_memory.py), whose published capacities it reproduces.
"""

from __future__ import annotations

from dataclasses import dataclass

from distserve.errors import PlanError
from distserve.sharding import Sharding, heads_fit, split_layers
from distserve.specs import DTYPE_BYTES, ModelSpec


@dataclass(frozen=True, slots=True)
class Accounting:
    """What counts against a device's memory."""

    utilization: float = 0.9  # share of the memory that an engine may fill (vLLM's default)
    activation: float = 0.02  # share of the memory for activations and workspace
    block_size: int = 16  # tokens
    tables_shared: bool = True  # ranks share the rows of the embedding and of the output head; False: each holds all
    tables_everywhere: bool = False  # each stage holds the embedding; False: only the stages that use the tables
    output_head: bool = True  # counted on the last stage (tied: where the stage does not hold the embedding anyway)
    # Vectors of the hidden size that are counted a layer. None: norms and biases as they are, and position rows, too,
    # which are otherwise one for each token of context (OPT has two more).
    layer_vectors: int | None = None


DISTSERVE = Accounting(
    utilization=0.95,
    activation=0.01,
    tables_shared=False,
    tables_everywhere=True,
    output_head=False,
    layer_vectors=5,
)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one instance can hold."""

    weights: int  # bytes on the rank that holds most
    kv_token: float  # bytes of one token's KV on the rank that holds most
    num_blocks: int  # KV blocks, limited by the tightest stage; 0: does not fit
    block_size: int  # tokens
    missing: int  # bytes that the tightest rank lacks to hold its weights and one block; 0: fits

    @property
    def fits(self) -> bool:
        return self.num_blocks > 0

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size


def allowed_tp(spec: ModelSpec) -> tuple[int, ...]:
    """The tensor parallelisms that divide the model: heads and MLP in equal parts; KV heads too, or each rank one."""
    return tuple(tp for tp in range(1, spec.num_heads + 1) if _divides(spec, tp))


def allowed_pp(spec: ModelSpec) -> tuple[int, ...]:
    """The pipeline parallelisms whose stages have equally many layers. Others work, limited by the longest stage."""
    return tuple(pp for pp in range(1, spec.num_layers + 1) if spec.num_layers % pp == 0)


def stage_layers(spec: ModelSpec, pp: int) -> tuple[int, ...]:
    """Layers of each stage; what pp does not divide goes to the first ones (the last computes the output head, too)."""
    return split_layers(spec.num_layers, pp)


def sharding(spec: ModelSpec, tp: int, pp: int) -> Sharding:
    """What each rank of an instance holds of the model's KV."""
    _check(spec, tp)
    return Sharding(spec.num_kv_heads, stage_layers(spec, pp), tp)


def kv_heads_per_rank(spec: ModelSpec, tp: int) -> int:
    """Ranks that outnumber the KV heads hold one each, so that several hold the same."""
    _check(spec, tp)
    return max(1, spec.num_kv_heads // tp)


def kv_token_bytes(spec: ModelSpec, tp: int = 1, pp: int = 1, dtype: str | None = None) -> int:
    """KV of one token on one rank of the longest stage."""
    return stage_layers(spec, pp)[0] * 2 * kv_heads_per_rank(spec, tp) * spec.head_dim * itemsize(spec, dtype)


def weight_bytes(
    spec: ModelSpec, tp: int = 1, pp: int = 1, dtype: str | None = None, accounting: Accounting = Accounting()
) -> int:
    """Weights on the rank that holds most."""
    return max(_stage_weights(spec, tp, pp, itemsize(spec, dtype), accounting))


def capacity(
    spec: ModelSpec,
    memory: int,
    tp: int = 1,
    pp: int = 1,
    *,
    dtype: str | None = None,
    kv_memory: int | float | None = None,
    accounting: Accounting = Accounting(),
) -> Capacity:
    """What an instance of tp * pp devices with `memory` bytes each can hold. `dtype` None: the checkpoint's own.
    `kv_memory`: most bytes of KV on each device, or their share of its memory (a plan's word); None: what is left.
    Raises `PlanError` where the model cannot be divided so."""
    size = itemsize(spec, dtype)
    budget = (accounting.utilization - accounting.activation) * memory
    head_bytes = 2 * kv_heads_per_rank(spec, tp) * spec.head_dim * size
    weights = _stage_weights(spec, tp, pp, size, accounting)
    blocks, missing = [], []
    for layers, held in zip(stage_layers(spec, pp), weights, strict=True):
        room = budget - held
        if kv_memory is not None:
            room = min(room, kv_memory if isinstance(kv_memory, int) else kv_memory * memory)
        block = layers * head_bytes * accounting.block_size
        blocks.append(max(0, int(room // block)))
        missing.append(max(0, int(block - room)))
    return Capacity(max(weights), kv_token_bytes(spec, tp, pp, dtype), min(blocks), accounting.block_size, max(missing))


def _stage_weights(spec: ModelSpec, tp: int, pp: int, size: int, accounting: Accounting) -> list[int]:
    """Bytes on one rank of each stage."""
    _check(spec, tp)
    hidden = spec.hidden_size
    rows = -(-spec.vocab_size // tp) if accounting.tables_shared else spec.vocab_size
    if accounting.layer_vectors is None:
        vectors, positions = spec.layer_vectors, spec.position_rows
    else:
        vectors, positions = accounting.layer_vectors * hidden, spec.max_model_len if spec.position_rows else 0
    found = []
    for stage, layers in enumerate(stage_layers(spec, pp)):
        embeds = stage == 0 or accounting.tables_everywhere
        projects = stage == pp - 1 and accounting.output_head and not (embeds and spec.tied_embeddings)
        tables = (rows + positions if embeds else 0) + (rows if projects else 0)
        found.append(size * (tables * hidden + layers * (spec.layer_matrices // tp + vectors)))
    return found


def itemsize(spec: ModelSpec, dtype: str | None) -> int:
    """Bytes of a number in `dtype`, or where that is None in the checkpoint's own."""
    wanted = spec.dtype if dtype is None else dtype
    if wanted not in DTYPE_BYTES:
        raise PlanError(f"dtype {wanted!r} is not known: give one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[wanted]


def _divides(spec: ModelSpec, tp: int) -> bool:
    return spec.num_heads % tp == spec.ffn_size % tp == 0 and heads_fit(spec.num_kv_heads, tp)


def _check(spec: ModelSpec, tp: int) -> None:
    if tp < 1 or not _divides(spec, tp):
        raise PlanError(
            f"tp = {tp} does not divide the model's {spec.num_heads} heads ({spec.num_kv_heads} of KV) and MLP of "
            f"{spec.ffn_size}: take one of {', '.join(map(str, allowed_tp(spec)))}"
        )
