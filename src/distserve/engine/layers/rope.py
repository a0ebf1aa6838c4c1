"""Rotary position embedding: tables of cosines and sines, and the half-split rotation that llama checkpoints use.

Frequency scalings follow Hugging Face's `modeling_rope_utils` (linear, dynamic, llama3, yarn, longrope; Su et al. 2021,
Peng et al. 2023, Ding et al. 2024). Two of them depend on the length of the sequence, and there turn all tokens of a
step by its last one's: what a token becomes would depend on how its prompt was cut. Here each token is turned as if it
were the last one: what transformers computes, too, where tokens come one by one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from distserve.errors import ModelError

SCALINGS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


class Rotary:
    """`cos` and `sin` [max_positions, D/2] in fp32. Immutable but for `to`."""

    def __init__(self, head_dim: int, theta: float, max_positions: int, scaling: dict[str, Any] | None = None) -> None:
        frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
        frequencies, magnitude = _scale(frequencies, head_dim, theta, max_positions, scaling or {})
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
        self.cos = (angles.cos() * magnitude).contiguous()
        self.sin = (angles.sin() * magnitude).contiguous()
        self.head_dim = head_dim

    def to(self, device: torch.device | str) -> Rotary:
        """Moves the tables, in place."""
        self.cos, self.sin = self.cos.to(device), self.sin.to(device)
        return self

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` [T, H, D] turned by `positions` [T]; fp32 arithmetic, rounded once to `x`'s dtype."""
        cos, sin = self.cos[positions.long(), None, :], self.sin[positions.long(), None, :]
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _scale(
    frequencies: Tensor, head_dim: int, theta: float, max_positions: int, scaling: dict[str, Any]
) -> tuple[Tensor, float]:
    """(scaled frequencies [D/2], or of each position [max_positions, D/2]; factor on cosines and sines)."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / float(scaling["factor"]), 1.0
    if kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if kind == "yarn":
        return _yarn(frequencies, head_dim, theta, max_positions, scaling)
    if kind == "dynamic":
        return _dynamic(frequencies, theta, max_positions, scaling), 1.0
    if kind == "longrope":
        return _longrope(frequencies, max_positions, scaling)
    raise ModelError(f"rope scaling {kind!r} is not supported (supported: {', '.join(SCALINGS)})")


def _llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    is_between = (wavelengths <= original / low) & (wavelengths >= original / high)
    return torch.where(is_between, between, scaled)


def _yarn(
    frequencies: Tensor, head_dim: int, theta: float, max_positions: int, scaling: dict[str, Any]
) -> tuple[Tensor, float]:
    original = int(scaling.get("original_max_position_embeddings") or max_positions)
    factor = float(scaling.get("factor") or max_positions / original)

    def correction(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    def magnitude(scale: float, weight: float) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    low = correction(float(scaling.get("beta_fast") or 32))
    high = correction(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    scaled = frequencies / factor * (1 - keep) + frequencies * keep

    attention = scaling.get("attention_factor")
    if attention is None:
        weight, whole = scaling.get("mscale"), scaling.get("mscale_all_dim")
        both = bool(weight and whole)
        attention = magnitude(factor, weight) / magnitude(factor, whole) if both else magnitude(factor, 1.0)  # type: ignore[arg-type]
    return scaled, float(attention)


def _dynamic(frequencies: Tensor, theta: float, max_positions: int, scaling: dict[str, Any]) -> Tensor:
    original, factor = int(scaling.get("original_max_position_embeddings") or max_positions), float(scaling["factor"])
    if max_positions <= original:  # they only change beyond the trained length
        return frequencies
    half = len(frequencies)
    lengths = torch.arange(original + 1, max_positions + 1, dtype=torch.float64)
    bases = theta * (factor * lengths / original - (factor - 1)) ** (half / (half - 1))
    changed = 1.0 / bases[:, None] ** (torch.arange(half, dtype=torch.float64) / half)
    return torch.cat((frequencies.expand(original, half), changed.float()))


def _longrope(frequencies: Tensor, max_positions: int, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    original = int(scaling["original_max_position_embeddings"])
    short, long = (torch.tensor(scaling[key], dtype=torch.float32) for key in ("short_factor", "long_factor"))
    if not short.shape == long.shape == frequencies.shape:
        raise ModelError(
            f"longrope scaling has {len(short)} short and {len(long)} long factors for {len(frequencies)} frequencies"
        )
    is_long = (torch.arange(1, max_positions + 1) > original)[:, None]
    factor, attention = float(scaling["factor"]), scaling.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return frequencies / torch.where(is_long, long, short), float(attention)
