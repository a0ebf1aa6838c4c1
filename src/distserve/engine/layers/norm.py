"""RMS normalisation, alone and fused with the residual addition before it, and LayerNorm; knows nothing of models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distserve.engine import kernels
from distserve.engine.kernels.bindings import DTYPES


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` [T, C] over its root mean square, times `weight` [C]; computed in fp32, rounded once."""
    library = kernels.load() if x.is_cpu and x.dtype in DTYPES and x.is_contiguous() else None
    if library is not None:
        return library.rms_norm(x, None, weight, eps)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of `residual + x` in `x`'s dtype, `residual + x`), both [T, C]. `residual` is fp32 (the sum of a hundred
    contributions in bf16 would lose those that are small) and may be overwritten with the sum."""
    fits = x.is_cpu and x.dtype in DTYPES and residual.dtype == torch.float32
    library = kernels.load() if fits and x.is_contiguous() and residual.is_contiguous() else None
    if library is not None:
        return library.rms_norm(x, residual, weight, eps), residual
    total = residual + x
    return rms_norm_reference(total, weight, eps), total


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain torch; the result has `weight`'s dtype."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(weight.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of `x` [T, C] fp32, in `weight`'s dtype. In plain torch everywhere; each row is reduced by itself, so
    that it does not depend on its batch."""
    return F.layer_norm(x, weight.shape, weight.float(), bias.float(), eps).to(weight.dtype)
