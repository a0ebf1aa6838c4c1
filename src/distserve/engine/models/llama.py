"""The llama family: Llama 2 and 3, SmolLM2, Mistral. RMS norms, rotary positions, grouped-query attention, gated MLP.

Which of them it is, is all in the spec. Projections that share an input are one matrix (q, k, v; gate, up). Families
that differ in a few lines (qwen2, qwen3) build on these modules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distserve.engine.collectives import Links
from distserve.engine.layers import (
    AttentionShape,
    BlockParts,
    GatedLinear,
    MergedLinear,
    Rotary,
    RowLinear,
    Stack,
    StepLayout,
    add_rms_norm,
    rms_norm,
    rope_attention,
)
from distserve.engine.models.base import Model, Slot
from distserve.engine.parallel import Place, Split
from distserve.specs import ModelSpec


class Norm(nn.Module):
    """The weight of one RMS norm."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum)."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class Attention(nn.Module):
    """Of a layer as wide as `spec` says: a rank's share."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, links: Links) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.window = spec.num_heads, spec.num_kv_heads, spec.sliding_window
        self.scale = spec.head_dim**-0.5
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.qkv = MergedLinear(spec.hidden_size, (q, kv, kv), spec.attention_bias or spec.qkv_bias, dtype=dtype)
        self.out = RowLinear(q, spec.hidden_size, spec.attention_bias, links=links, dtype=dtype)

    def forward(self, x: Tensor, rope: Rotary, kv: Tensor, step: StepLayout) -> Tensor:
        qkv = self.qkv(x)
        y = rope_attention(qkv, rope, kv, step, self.num_heads, self.num_kv_heads, self.scale, self.window)
        out: Tensor = self.out(y)
        return out


class Layer(nn.Module):
    """One transformer block, as wide as `spec` says. The residual stream is kept apart, so that adding and normalising
    are one pass."""

    attention_type: type[Attention] = Attention

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, links: Links) -> None:
        super().__init__()
        self.attention_norm = Norm(spec.hidden_size, spec.norm_eps, dtype)
        self.attention = self.attention_type(spec, dtype, links)
        self.mlp_norm = Norm(spec.hidden_size, spec.norm_eps, dtype)
        self.gate_up = GatedLinear(spec.hidden_size, spec.ffn_size, spec.mlp_bias, dtype=dtype)
        self.down = RowLinear(spec.ffn_size, spec.hidden_size, spec.mlp_bias, links=links, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor, rope: Rotary, kv: Tensor, step: StepLayout) -> tuple[Tensor, Tensor]:
        """`x`: what the block before adds to the residual stream. (This block's contribution, the stream before it in
        fp32), both [T, C]."""
        x, residual = self.attention_norm.add(x, residual)
        x, residual = self.mlp_norm.add(self.attention(x, rope, kv, step), residual)
        return self.down(self.gate_up(x)), residual

    def parts(self) -> BlockParts:
        attention = self.attention
        norms = (self.attention_norm.weight, self.mlp_norm.weight)
        return BlockParts(norms[0], attention.qkv, attention.out, norms[1], self.gate_up, self.down)


class Llama(Model):
    layer_type: type[Layer] = Layer

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, place: Place, links: Links) -> None:
        super().__init__(spec, dtype, place, links)
        part = place.part(spec)
        self.layers = nn.ModuleDict({str(i): self.layer_type(part, dtype, links) for i in place.layers})
        if place.is_last:
            self.norm = Norm(spec.hidden_size, spec.norm_eps, dtype)

    def finish(self, max_model_len: int, device: torch.device) -> None:
        scaling = None if self.spec.rope_scaling is None else dict(self.spec.rope_scaling)
        self.rope = Rotary(self.spec.head_dim, self.spec.rope_theta, max_model_len, scaling).to(device)
        self.stack = self.build_stack()

    def build_stack(self) -> Stack | None:
        """The blocks in one call of the kernels; None where they are called one by one."""
        parts = [layer.parts() for layer in self.layers.values() if isinstance(layer, Layer)]
        num_heads = self.place.part(self.spec).num_heads
        shape = AttentionShape(num_heads, self.spec.head_dim**-0.5, self.spec.sliding_window)
        return Stack.build(parts, shape, self.spec.norm_eps, self.links)

    def embed(self, ids: Tensor, step: StepLayout) -> Tensor:
        residual: Tensor = self.embedding(ids)
        return residual

    def blocks(self, residual: Tensor, step: StepLayout, kv: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        if self.stack is not None:
            return self.stack.forward(residual, self.rope, kv, step, rows)
        x = torch.zeros_like(residual, dtype=self.dtype)
        for layer, cache in zip(self.layers.values(), kv, strict=True):
            x, residual = layer(x, residual, self.rope, cache, step)
        if rows is not None:
            x, residual = x[rows], residual[rows]
        return residual + x

    def final(self, residual: Tensor) -> Tensor:
        return self.norm.add(torch.zeros_like(residual, dtype=self.dtype), residual)[0]

    def slots(self) -> list[Slot]:
        slots = self.table_slots("model.embed_tokens.weight")
        for i in range(self.spec.num_layers):
            slots += self.layer_slots(f"model.layers.{i}", f"layers.{i}")
        return [*slots, Slot("model.norm.weight", "norm", "weight", (self.spec.hidden_size,))]

    def layer_slots(self, source: str, target: str) -> list[Slot]:
        """Of one layer: `source` begins its tensors' names, `target` its modules'."""
        return _layer_slots(self.spec, source, target)


def _layer_slots(spec: ModelSpec, source: str, target: str) -> list[Slot]:
    hidden, ffn, heads, kv_heads = spec.hidden_size, spec.ffn_size, spec.num_heads, spec.num_kv_heads
    q, kv = heads * spec.head_dim, kv_heads * spec.head_dim
    qkv_bias, out_bias = spec.attention_bias or spec.qkv_bias, spec.attention_bias
    slots = [
        Slot(f"{source}.input_layernorm.weight", f"{target}.attention_norm", "weight", (hidden,)),
        Slot(f"{source}.post_attention_layernorm.weight", f"{target}.mlp_norm", "weight", (hidden,)),
    ]
    # checkpoint name, module, its (rows, columns), how ranks share it, units, part, rotated heads, has a bias
    linears = (
        ("self_attn.q_proj", "attention.qkv", (q, hidden), Split.COLUMN, heads, 0, heads, qkv_bias),
        ("self_attn.k_proj", "attention.qkv", (kv, hidden), Split.KV_HEADS, kv_heads, 1, kv_heads, qkv_bias),
        ("self_attn.v_proj", "attention.qkv", (kv, hidden), Split.KV_HEADS, kv_heads, 2, 0, qkv_bias),
        ("self_attn.o_proj", "attention.out", (hidden, q), Split.ROW, heads, None, 0, out_bias),
        ("mlp.gate_proj", "gate_up", (ffn, hidden), Split.COLUMN, ffn, 0, 0, spec.mlp_bias),
        ("mlp.up_proj", "gate_up", (ffn, hidden), Split.COLUMN, ffn, 1, 0, spec.mlp_bias),
        ("mlp.down_proj", "down", (hidden, ffn), Split.ROW, ffn, None, 0, spec.mlp_bias),
    )
    for name, module, shape, split, units, part, rotated, bias in linears:
        where = f"{target}.{module}"
        slots.append(Slot(f"{source}.{name}.weight", where, "weight", shape, split, units, part, rotated))
        if bias:
            bias_split = Split.ONCE if split is Split.ROW else split
            slots.append(Slot(f"{source}.{name}.bias", where, "bias", shape[:1], bias_split, units, part, rotated))
    return slots


build = Llama
