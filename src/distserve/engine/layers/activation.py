"""The activations between the two halves of an MLP."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distserve.engine import kernels
from distserve.engine.kernels.bindings import DTYPES


def silu_mul(x: Tensor) -> Tensor:
    """`x` [T, 2F], gate and up side by side -> silu(gate) * up [T, F], computed in fp32 and rounded once."""
    library = kernels.load() if x.is_cpu and x.dtype in DTYPES and x.is_contiguous() else None
    return silu_mul_reference(x) if library is None else library.silu_mul(x)


def silu_mul_reference(x: Tensor) -> Tensor:
    """`silu_mul` in plain torch."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU as GPT-2 approximates it (Hendrycks and Gimpel 2016, section 2), in fp32 and rounded once.

    Spelled out: `F.gelu` computes the last elements of a tensor otherwise than the rest, so that a token's value would
    depend on how many are in the batch."""
    wide = x.float()
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    return (0.5 * wide * (1 + torch.tanh(inner))).to(x.dtype)
