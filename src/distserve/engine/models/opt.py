"""The OPT family: learned positions, LayerNorm, biases everywhere, an MLP of two matrices. Families of the same age
(gpt2) build on these modules.

Most normalise before attention and before the MLP. OPT-350m does so after each, on the sum with the residual stream,
and projects its shorter embeddings up to the hidden size and back down before the head. The kernels' one call of all
blocks knows no such block, so modules are called one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distserve.engine.collectives import Links
from distserve.engine.layers import Embedding, Linear, MergedLinear, RowLinear, StepLayout, attention, layer_norm
from distserve.engine.models.base import Model, Slot
from distserve.engine.parallel import Place, Split
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

    def forward(self, residual: Tensor) -> Tensor:
        return layer_norm(residual, self.weight, self.bias, self.eps)


class Layer(nn.Module):
    """One transformer block, as wide as `spec` says: a rank's share. The residual stream is fp32."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, links: Links) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = spec.num_heads, spec.head_dim, spec.head_dim**-0.5
        self.norm_after, self.dtype = spec.norm_after, dtype
        width = spec.num_heads * spec.head_dim
        self.attention_norm = Norm(spec.hidden_size, spec.norm_eps, dtype)
        self.qkv = MergedLinear(spec.hidden_size, (width, width, width), True, dtype=dtype)
        self.out = RowLinear(width, spec.hidden_size, True, links=links, dtype=dtype)
        self.mlp_norm = Norm(spec.hidden_size, spec.norm_eps, dtype)
        self.up = Linear(spec.hidden_size, spec.ffn_size, True, dtype=dtype)
        self.down = RowLinear(spec.ffn_size, spec.hidden_size, True, links=links, dtype=dtype)

    def activation(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def forward(self, residual: Tensor, kv: Tensor, step: StepLayout) -> Tensor:
        """The residual stream after the block, of that before it, both [T, C]."""
        if self.norm_after:
            x: Tensor = self.attention_norm(residual + self.attend(residual.to(self.dtype), kv, step))
            x = self.mlp_norm(x.float() + self.mlp(x))
            return x.float()
        residual = residual + self.attend(self.attention_norm(residual), kv, step)
        return residual + self.mlp(self.mlp_norm(residual))

    def mlp(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.activation(self.up(x)))
        return y

    def attend(self, x: Tensor, kv: Tensor, step: StepLayout) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.num_heads, self.head_dim).unbind(1)
        y: Tensor = self.out(attention(q, k, v, kv, step, self.scale))
        return y


class OPT(Model):
    layer_type: type[Layer] = Layer
    first_position = _PADDING  # row of the table of positions that belongs to a sequence's first token

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, place: Place, links: Links) -> None:
        super().__init__(spec, dtype, place, links)
        if spec.num_kv_heads != spec.num_heads:
            raise ModelError(
                f"the checkpoint's configuration says {spec.num_heads} attention heads over {spec.num_kv_heads} KV "
                f"heads, which models of the family {spec.family!r} do not have; remove num_key_value_heads"
            )
        part, hidden, width = place.part(spec), spec.hidden_size, spec.embedding_size
        self.layers = nn.ModuleDict({str(i): self.layer_type(part, dtype, links) for i in place.layers})
        if place.is_first:
            self.positions = Embedding(spec.position_rows, hidden, dtype=dtype)
            self.project_in = Linear(width, hidden, dtype=dtype) if width else None
        if place.is_last:
            self.norm = None if spec.norm_after else Norm(hidden, spec.norm_eps, dtype)
            self.project_out = Linear(hidden, width, dtype=dtype) if width else None

    def finish(self, max_model_len: int, device: torch.device) -> None:
        """Nothing is computed: positions are learned."""

    def embed(self, ids: Tensor, step: StepLayout) -> Tensor:
        x: Tensor = self.embedding(ids)
        if self.project_in is not None:
            x = self.project_in(x.to(self.dtype))
        positions: Tensor = self.positions(step.positions + self.first_position)
        return positions.float() + x

    def blocks(self, residual: Tensor, step: StepLayout, kv: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        for layer, cache in zip(self.layers.values(), kv, strict=True):
            residual = layer(residual, cache, step)
        return residual if rows is None else residual[rows]

    def final(self, residual: Tensor) -> Tensor:
        x = residual.to(self.dtype) if self.norm is None else self.norm(residual)
        return x if self.project_out is None else self.project_out(x)

    def slots(self) -> list[Slot]:
        spec, source = self.spec, "model.decoder"
        positions, projection = (spec.position_rows, spec.hidden_size), (spec.hidden_size, spec.embedding_size)
        slots = self.table_slots(f"{source}.embed_tokens.weight")
        slots.append(Slot(f"{source}.embed_positions.weight", "positions", "weight", positions))
        for i in range(spec.num_layers):
            slots += _layer_slots(spec, f"{source}.layers.{i}", f"layers.{i}")
        if not spec.norm_after:
            slots += norm_slots(spec, f"{source}.final_layer_norm", "norm")
        if spec.embedding_size:
            slots.append(Slot(f"{source}.project_in.weight", "project_in", "weight", projection))
            slots.append(Slot(f"{source}.project_out.weight", "project_out", "weight", projection[::-1]))
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
        bias_split = Split.ONCE if split is Split.ROW else split
        where = f"{target}.{module}"
        slots.append(Slot(f"{source}.{name}.weight", where, "weight", shape, split, units, part))
        slots.append(Slot(f"{source}.{name}.bias", where, "bias", shape[:1], bias_split, units, part))
    return slots


build = OPT
