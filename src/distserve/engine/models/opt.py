"""The OPT family: learned positions, LayerNorm before attention and before the MLP, biases everywhere, an MLP of two
matrices. Families of the same age (gpt2) build on these modules.

The kernels' one call of all blocks knows no such block, so modules are called one by one. OPT-350m, which normalises
after each block, is refused where its configuration is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distserve.engine.layers import Embedding, Head, Linear, MergedLinear, StepLayout, add_layer_norm, attention
from distserve.engine.models.base import Model, Slot
from distserve.engine.parallel import Split
from distserve.errors import ModelError
from distserve.specs import ModelSpec

_PADDING = 2  # the first rows of OPT's table of positions


class Norm(nn.Module):
    """The weight and the bias of one LayerNorm."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim, dtype=dtype), requires_grad=False)
        self.eps = eps

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum)."""
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class Layer(nn.Module):
    """One transformer block. The residual stream is kept apart, in fp32."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = spec.num_heads, spec.head_dim, spec.head_dim**-0.5
        width = spec.num_heads * spec.head_dim
        self.attention_norm = Norm(spec.hidden_size, spec.norm_eps, dtype)
        self.qkv = MergedLinear(spec.hidden_size, (width, width, width), True, dtype=dtype)
        self.out = Linear(width, spec.hidden_size, True, dtype=dtype)
        self.mlp_norm = Norm(spec.hidden_size, spec.norm_eps, dtype)
        self.up = Linear(spec.hidden_size, spec.ffn_size, True, dtype=dtype)
        self.down = Linear(spec.ffn_size, spec.hidden_size, True, dtype=dtype)

    def activation(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def forward(self, x: Tensor, residual: Tensor, kv: Tensor, step: StepLayout) -> tuple[Tensor, Tensor]:
        """(this block's contribution, the residual stream before it), both [T, C]."""
        x, residual = self.attention_norm.add(x, residual)
        q, k, v = self.qkv(x).view(len(x), 3, self.num_heads, self.head_dim).unbind(1)
        x, residual = self.mlp_norm.add(self.out(attention(q, k, v, kv, step, self.scale)), residual)
        return self.down(self.activation(self.up(x))), residual


class OPT(Model):
    layer_type: type[Layer] = Layer
    first_position = _PADDING  # row of the table of positions that belongs to a sequence's first token

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__()
        if spec.num_kv_heads != spec.num_heads:
            raise ModelError(
                f"the checkpoint's configuration says {spec.num_heads} attention heads over {spec.num_kv_heads} KV "
                f"heads, which models of the family {spec.family!r} do not have; remove num_key_value_heads"
            )
        self.spec = spec
        self.embedding = Embedding(spec.vocab_size, spec.hidden_size, dtype=dtype)
        self.positions = Embedding(spec.position_rows, spec.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(self.layer_type(spec, dtype) for _ in range(spec.num_layers))
        self.norm = Norm(spec.hidden_size, spec.norm_eps, dtype)
        tied = self.embedding if spec.tied_embeddings else None
        self.head = Head(spec.hidden_size, spec.vocab_size, tied=tied, dtype=dtype)

    def finish(self, max_model_len: int, device: torch.device) -> None:
        """Nothing is computed: positions are learned."""

    def forward(self, ids: Tensor, step: StepLayout, kv: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        x: Tensor = self.embedding(ids)
        residual: Tensor = self.positions(step.positions + self.first_position).float()
        for layer, cache in zip(self.layers, kv, strict=True):
            x, residual = layer(x, residual, cache, step)
        if rows is not None:
            x, residual = x[rows], residual[rows]
        hidden, _ = self.norm.add(x, residual)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head.logits(hidden)

    def slots(self) -> list[Slot]:
        spec, source = self.spec, "model.decoder"
        table = (spec.vocab_size, spec.hidden_size)
        positions = (spec.position_rows, spec.hidden_size)
        slots = [
            Slot(f"{source}.embed_tokens.weight", "embedding", "weight", table, Split.VOCABULARY, spec.vocab_size),
            Slot(f"{source}.embed_positions.weight", "positions", "weight", positions),
        ]
        for i in range(spec.num_layers):
            slots += _layer_slots(spec, f"{source}.layers.{i}", f"layers.{i}")
        slots += norm_slots(spec, f"{source}.final_layer_norm", "norm")
        if not spec.tied_embeddings:
            slots.append(Slot("lm_head.weight", "head", "out.weight", table, Split.VOCABULARY, spec.vocab_size))
        return slots


def norm_slots(spec: ModelSpec, source: str, target: str) -> list[Slot]:
    return [Slot(f"{source}.{name}", target, name, (spec.hidden_size,)) for name in ("weight", "bias")]


def _layer_slots(spec: ModelSpec, source: str, target: str) -> list[Slot]:
    hidden, ffn, heads, width = spec.hidden_size, spec.ffn_size, spec.num_heads, spec.num_heads * spec.head_dim
    slots = norm_slots(spec, f"{source}.self_attn_layer_norm", f"{target}.attention_norm")
    slots += norm_slots(spec, f"{source}.final_layer_norm", f"{target}.mlp_norm")
    # checkpoint name, module, its (rows, columns), how ranks share it, units, part
    linears = (
        ("self_attn.q_proj", "qkv", (width, hidden), Split.COLUMN, heads, 0),
        ("self_attn.k_proj", "qkv", (width, hidden), Split.COLUMN, heads, 1),
        ("self_attn.v_proj", "qkv", (width, hidden), Split.COLUMN, heads, 2),
        ("self_attn.out_proj", "out", (hidden, width), Split.ROW, heads, None),
        ("fc1", "up", (ffn, hidden), Split.COLUMN, ffn, None),
        ("fc2", "down", (hidden, ffn), Split.ROW, ffn, None),
    )
    for name, module, shape, split, units, part in linears:
        bias_split = Split.REPLICATED if split is Split.ROW else split  # added once, after the ranks' sum
        where = f"{target}.{module}"
        slots.append(Slot(f"{source}.{name}.weight", where, "weight", shape, split, units, part))
        slots.append(Slot(f"{source}.{name}.bias", where, "bias", shape[:1], bias_split, units, part))
    return slots


build = OPT
