"""The gated activation between the two halves of an MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(x: Tensor) -> Tensor:
    """`x` [T, 2F], gate and up side by side -> silu(gate) * up [T, F], computed in fp32 and rounded once."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)
