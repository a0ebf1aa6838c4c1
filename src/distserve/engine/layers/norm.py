"""RMS normalisation, alone and fused with the residual addition before it; knows nothing of models."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` [T, C] over its root mean square, times `weight` [C]; statistics in fp32, as the checkpoints were trained."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of `residual + x`, `residual + x`), both [T, C]. `residual` may be overwritten with the sum."""
    total = residual + x
    return rms_norm(total, weight, eps), total
