"""The GPT-2 family: OPT's block with GELU in its MLP, a table of positions without padding, and weights that are stored
input features first, queries, keys and values in one.
"""

from __future__ import annotations

from torch import Tensor

from distserve.engine.layers import gelu_tanh
from distserve.engine.models.base import Slot
from distserve.engine.models.opt import OPT, Layer, norm_slots
from distserve.engine.parallel import Split
from distserve.specs import ModelSpec


class GeluLayer(Layer):
    def activation(self, x: Tensor) -> Tensor:
        return gelu_tanh(x)


class GPT2(OPT):
    layer_type = GeluLayer
    first_position = 0
    prefix = "transformer."

    def slots(self) -> list[Slot]:
        spec = self.spec
        positions = (spec.position_rows, spec.hidden_size)
        slots = self.table_slots("transformer.wte.weight")
        slots.append(Slot("transformer.wpe.weight", "positions", "weight", positions))
        for i in range(spec.num_layers):
            slots += _layer_slots(spec, f"transformer.h.{i}", f"layers.{i}")
        return slots + norm_slots(spec, "transformer.ln_f", "norm")


def _layer_slots(spec: ModelSpec, source: str, target: str) -> list[Slot]:
    hidden, ffn, heads = spec.hidden_size, spec.ffn_size, spec.num_heads
    slots = norm_slots(spec, f"{source}.ln_1", f"{target}.attention_norm")
    slots += norm_slots(spec, f"{source}.ln_2", f"{target}.mlp_norm")
    # checkpoint name, module, its (rows, columns), how ranks share it, units, parts in the checkpoint's tensor
    linears = (
        ("attn.c_attn", "qkv", (hidden, hidden), Split.COLUMN, heads, 3),
        ("attn.c_proj", "out", (hidden, hidden), Split.ROW, heads, 1),
        ("mlp.c_fc", "up", (ffn, hidden), Split.COLUMN, ffn, 1),
        ("mlp.c_proj", "down", (hidden, ffn), Split.ROW, ffn, 1),
    )
    for name, module, shape, split, units, fused in linears:
        bias_split = Split.ONCE if split is Split.ROW else split
        for number in range(fused):
            where, part = f"{target}.{module}", number if fused > 1 else None
            weight = Slot(f"{source}.{name}.weight", where, "weight", shape, split, units, part, 0, True, fused)
            bias = Slot(f"{source}.{name}.bias", where, "bias", shape[:1], bias_split, units, part, 0, False, fused)
            slots += [weight, bias]
    return slots


build = GPT2
