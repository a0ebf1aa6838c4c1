"""The Qwen3 family: llama with an RMS norm over each head's queries and keys before they are rotated. A head's size is
its own, not the hidden size over the heads.

The kernels' one call of all blocks knows no such norm, so modules are called one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distserve.engine.collectives import Links
from distserve.engine.layers import Rotary, Stack, StepLayout, rope_attention
from distserve.engine.models.base import Slot
from distserve.engine.models.llama import Attention, Layer, Llama, Norm
from distserve.specs import ModelSpec


class NormedAttention(Attention):
    def __init__(self, spec: ModelSpec, dtype: torch.dtype, links: Links) -> None:
        super().__init__(spec, dtype, links)
        self.query_norm = Norm(spec.head_dim, spec.norm_eps, dtype)
        self.key_norm = Norm(spec.head_dim, spec.norm_eps, dtype)

    def forward(self, x: Tensor, rope: Rotary, kv: Tensor, step: StepLayout) -> Tensor:
        qkv = self.qkv(x)
        heads = qkv.view(len(x), self.num_heads + 2 * self.num_kv_heads, -1)
        queries = heads[:, : self.num_heads]
        keys = heads[:, self.num_heads : self.num_heads + self.num_kv_heads]
        for part, norm in ((queries, self.query_norm), (keys, self.key_norm)):
            part.copy_(norm(part.reshape(-1, part.shape[2])).view(part.shape))
        y = rope_attention(qkv, rope, kv, step, self.num_heads, self.num_kv_heads, self.scale, self.window)
        out: Tensor = self.out(y)
        return out


class NormedLayer(Layer):
    attention_type = NormedAttention


class Qwen3(Llama):
    layer_type = NormedLayer

    def build_stack(self) -> Stack | None:
        return None

    def layer_slots(self, source: str, target: str) -> list[Slot]:
        shape = (self.spec.head_dim,)
        return [
            *super().layer_slots(source, target),
            Slot(f"{source}.self_attn.q_norm.weight", f"{target}.attention.query_norm", "weight", shape),
            Slot(f"{source}.self_attn.k_norm.weight", f"{target}.attention.key_norm", "weight", shape),
        ]


build = Qwen3
